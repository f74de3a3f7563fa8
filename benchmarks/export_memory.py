"""Measure the peak memory of exporting and resharding a checkpoint of any size.

    python -m benchmarks.export_memory --gib 4 --folder /big/disk --json FILE

Creates a synthetic checkpoint (weights and moments of one SAE), exports and reshards it in separate
processes, and removes all files. The peak is a process's high-water mark of resident memory
(`VmHWM`). "baseline" exports a checkpoint of a few KiB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.synthetic_checkpoint import make_checkpoint
from cluster.run_folder.environment import ROOT, environment
from cluster.run_folder.files import CHECKPOINTS

WIDTH = 2048
_BYTES_PER_LATENT = 6 * WIDTH * 4  # two matrices, and two moments of each
_PREPARED = (
    "import torch, sys, time; from pathlib import Path; from conf.schema.run import RunConfig"
)
_PEAK = (
    "print([int(line.split()[1]) * 1024 for line in open('/proc/self/status') "
    "if line.startswith('VmHWM')][0])"
)
_ACTIONS = {
    "export": "from analysis.export import stage;"
    "stage.run(RunConfig(name='big'), Path(sys.argv[1]))",
    "reshard": "from sae_core.config import CHECKPOINTS;"
    "from sae_core.checkpoint.folder import newest_valid;"
    "from sae_core.checkpoint.reshard import reshard_checkpoint;"
    "run = Path(sys.argv[1]);"
    "reshard_checkpoint(newest_valid(run / CHECKPOINTS), run / 'out', 3)",
}


def measure(run_dir: Path, *actions: str) -> tuple[int, float]:
    """Run some of `_ACTIONS` in a new process; return its (peak resident bytes, seconds).

    Raises:
        RuntimeError: If the process fails; the message is its stderr.
    """
    code = "\n".join([_PREPARED, *(_ACTIONS[action] for action in actions), _PEAK])
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.split()[-1]), time.monotonic() - began


def table(run_dir: Path) -> list[dict[str, Any]]:
    """Measure each action on the run's checkpoint; return one row per action."""
    files = (run_dir / CHECKPOINTS).rglob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    make_checkpoint(run_dir / "tiny" / CHECKPOINTS, 16, 16)
    rows = []
    for action in ("baseline", *_ACTIONS):
        tiny = action == "baseline"
        peak, seconds = measure(run_dir / "tiny" if tiny else run_dir, "export" if tiny else action)
        n_bytes = 0 if tiny else size
        rows.append(
            {"op": action, "checkpoint_bytes": n_bytes, "peak_bytes": peak, "seconds": seconds}
        )
    return rows


def main() -> None:
    """Create a temporary checkpoint, measure, print the rows and write them with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint in GiB")
    parser.add_argument(
        "--folder", type=Path, help="folder for the checkpoint; needs twice its size of free space"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    run_dir = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        n_latents = int(arguments.gib * 2**30) // _BYTES_PER_LATENT
        make_checkpoint(run_dir / CHECKPOINTS, n_latents, WIDTH)
        rows = table(run_dir)
    finally:
        shutil.rmtree(run_dir)
    for row in rows:
        print(
            f"{row['op']:9} checkpoint {row['checkpoint_bytes'] / 2**30:.2f} GiB, "
            f"peak {row['peak_bytes'] / 2**20:.0f} MiB, {row['seconds']:.0f} s"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({**environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
