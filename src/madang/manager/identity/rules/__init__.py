"""Decisions about people, pure: who may do what, names, scopes, second factors, throttling."""
