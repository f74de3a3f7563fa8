"""Measure the peers' training steps, each in a separate process inside `.venv-peers`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import PeerError
from cluster.run_folder.environment import ROOT, threads

PEERS = ("eai-sparsify", "sae-lens", "dictionary-learning")
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
HOW_TO_MAKE = "create it with: benchmarks/harness/make_peers_env.sh"


def peers_available() -> bool:
    """Return True if the peers' environment was installed completely."""
    return (PEERS_PYTHON.parent.parent / ".complete").exists()


def peer_rows(
    work: dict[str, Any],
    *,
    peers: Sequence[str] = PEERS,
    rounds: int = 7,
    timeout_s: float = 900.0,
) -> list[dict[str, Any]]:
    """Time each peer's own training step and the yardstick, a bare GEMM, in float32 on the CPU.

    Each peer gets as many threads as torch uses in this process, or all cores if torch is not
    loaded here.

    Args:
        work: L latents, D width, B batch rows, k active; `adam`: "fused" (default) or "stock", the
            peer's own choice. Other keys, such as dtype, are only copied to the row.
        peers: Package names from `PEERS`.
        rounds: Number of samples of the step and of each GEMM.
        timeout_s: Time limit for one peer.

    Returns:
        One row per peer: {work, system, op, median_s, ratio, tokens_per_s, peak_bytes, gemm_s,
        linear_s, ratio_linear, version}. `ratio` is relative to the oneDNN GEMM timed in the same
        process. `peak_bytes` is the resident memory added by building the trainer and stepping. If
        the peers' environment is missing, there are no rows and the reason is printed on stderr.

    Raises:
        PeerError: If a peer's step fails or takes too long.
    """
    if not peers_available():
        print(
            f"peers skipped: .venv-peers is missing or incomplete; {HOW_TO_MAKE}", file=sys.stderr
        )
        return []
    return [_row(peer, work, rounds, timeout_s) for peer in peers]


def _row(peer: str, work: dict[str, Any], rounds: int, timeout_s: float) -> dict[str, Any]:
    arguments = ["benchmarks.step.peer_process", peer, json.dumps(work), "--rounds", str(rounds)]
    row: dict[str, Any] = run_in_peers(f"{peer} at {work}", arguments, timeout_s)
    return row


def run_in_peers(what: str, arguments: Sequence[str], timeout_s: float) -> Any:
    """Run one of our modules in the peers' environment and return the JSON it writes to `--out`.

    Args:
        what: Name of the measurement, for error messages.
        arguments: The module and its arguments, without `--out`.
        timeout_s: Time limit.

    Raises:
        PeerError: If the process fails or takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        try:
            done = subprocess.run(
                [str(PEERS_PYTHON), "-m", *arguments, "--out", str(out)],
                cwd=ROOT,
                env=peer_environment(),
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"{what}: not finished after {timeout_s:.0f} s") from error
        if done.returncode != 0:
            raise PeerError(f"{what}: exit code {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(out.read_text())


def peer_environment() -> dict[str, str]:
    """Return environment variables for a process in `.venv-peers`: quiet, offline, same threads."""
    environment = {
        **os.environ,
        "SPARSIFY_DISABLE_TRITON": "1",  # sparsify's Triton decoder does not run on a CPU
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "PYTHONPATH": str(ROOT),
    }
    count = threads()
    if count is not None:
        environment["OMP_NUM_THREADS"] = str(count)
    return environment
