"""Checkpoints that are either sealed or not there: manifest, store, retention."""

from .manifest import MANIFEST, Manifest, read_manifest, seal, verify, versions
from .store import CheckpointStore, Sealed

__all__ = ["MANIFEST", "CheckpointStore", "Manifest", "Sealed", "read_manifest", "seal", "verify", "versions"]
