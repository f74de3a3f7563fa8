"""Sharded checkpoints: safetensors row ranges, JSON state, a manifest of hashes, atomic rename."""

from sae_core.checkpoint.background_saver import CheckpointSaver
from sae_core.checkpoint.folder import (
    CheckpointState,
    check_manifest,
    list_checkpoints,
    newest_valid,
    read_state,
)
from sae_core.checkpoint.load import agreed_checkpoint, load_checkpoint

__all__ = [
    "CheckpointSaver",
    "CheckpointState",
    "agreed_checkpoint",
    "check_manifest",
    "list_checkpoints",
    "load_checkpoint",
    "newest_valid",
    "read_state",
]
