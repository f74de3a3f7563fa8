"""Reshard stage: rewrite the newest checkpoint with a different number of files.

The original checkpoint is kept. Fewer, larger files are easier to archive or to transfer. The new
`step-N/` can also be moved into the `checkpoints/` of another run, which then resumes from it.
Resuming never needs this stage: any device mesh can resume from any number of files.
"""

from __future__ import annotations

from pathlib import Path

from cluster.run_folder.files import CHECKPOINTS, RESHARDED
from conf.schema.run import RunConfig


def run(config: RunConfig, run_dir: Path) -> None:
    """Write `step-N` to the folder `reshard.to`, or by default to `resharded/` in the run folder.

    Raises:
        CheckpointError: If the run has no valid checkpoint, or if the target folder exists.
        ConfigError: If `reshard.shards` exceeds the number of latents.
    """
    from sae_core.checkpoint.folder import newest_valid
    from sae_core.checkpoint.reshard import reshard_checkpoint
    from sae_core.errors import CheckpointError

    source = newest_valid(run_dir / CHECKPOINTS, config.checkpoint.verify_hashes)
    if source is None:
        raise CheckpointError(f"{run_dir}: no valid checkpoint found; train with stage=train first")
    to = config.reshard.to
    root = Path(to).expanduser().resolve() if to else run_dir / RESHARDED
    final = reshard_checkpoint(source, root, config.reshard.shards)
    print(f"reshard: wrote {final}, with {config.reshard.shards} files each of weights and moments")
