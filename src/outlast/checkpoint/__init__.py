"""Checkpoints that are either sealed or not there: manifest, writer, store, retention."""

from . import origin
from .manifest import MANIFEST, Manifest, PassingError, Sealed, read_manifest, verify, versions
from .room import Room
from .store import CheckpointStore, SaveError

__all__ = [
    "MANIFEST",
    "CheckpointStore",
    "Manifest",
    "PassingError",
    "Room",
    "SaveError",
    "Sealed",
    "origin",
    "read_manifest",
    "verify",
    "versions",
]
