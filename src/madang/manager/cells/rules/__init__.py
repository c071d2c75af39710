"""What an interpreter's output means; pure."""
