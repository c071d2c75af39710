"""Bytes by their content: the files of working directories."""

from madang.storage.blobs import BlobStore

__all__ = ["BlobStore"]
