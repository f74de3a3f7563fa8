"""The reshard stage: the newest checkpoint with another number of files, beside the old one.

For fewer, larger files to keep or to send, and for another run: `step-N/` in its `checkpoints/`
is resumed from. Any mesh resumes from any number of files, so nothing else needs this stage.
"""

from __future__ import annotations

from pathlib import Path

from conf.schema import RunConfig


def run(config: RunConfig, run_dir: Path) -> None:
    """Writes `reshard.to/step-N`, or `resharded/step-N` in the run's folder.

    Raises:
        CheckpointError: the run has no valid checkpoint, or that folder exists.
        ConfigError: more shards than latents.
    """
    from sae_core.checkpoint.folder import newest_valid
    from sae_core.checkpoint.reshard import reshard_checkpoint
    from sae_core.errors import CheckpointError

    source = newest_valid(run_dir / "checkpoints", config.checkpoint.verify_hashes)
    if source is None:
        raise CheckpointError(f"{run_dir}: no valid checkpoint; train first with stage=train")
    to = config.reshard.to
    root = Path(to).expanduser().resolve() if to else run_dir / "resharded"
    final = reshard_checkpoint(source, root, config.reshard.shards)
    print(f"reshard: {final}, {config.reshard.shards} files each of weights and moments")
