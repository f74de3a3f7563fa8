"""Soak episodes without Ray: two trainer ranks, started as torchrun would, with repeated faults."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from cluster.run_folder.saved_config import load_config, save_config
from foundation.errors import EXIT_PREEMPTED
from sae_core.checkpoint.folder import list_checkpoints, step_of
from tests.soak.run import (
    HANG_S,
    SAVE_EVERY,
    STEPS,
    Clean,
    Episode,
    Verdict,
    assert_named,
    damage_checkpoints,
)
from tests.support.injection import last_step
from tests.support.ranks import CHECKPOINT_FAILED, Ranks, cluster_rank

RANKS = 2
PATIENCE_S = 240
MOST_STARTS = 40
NO_ROOM_BYTES = 4096
"""File size limit that makes a rank's disk seem full; a rank's checkpoint part is larger."""
KILLED = -signal.SIGKILL
STRIKES = ("kill", "kill in a save", "stop", "hang", "no room", "in the way")


def ranks_episode(clean: Clean, episode: Episode) -> Verdict:
    """Restart the ranks until they succeed, with one fault per start; they read the clean store."""
    _make_run(clean, episode.run_dir)
    order: list[str] = []
    for start in range(MOST_STARTS):
        damaged = damage_checkpoints(episode, most=3)
        order = order or episode.random.sample(STRIKES, len(STRIKES))
        strike = order.pop()
        barrier = _block_next_checkpoint(episode) if strike == "in the way" else None
        before = _metrics_bytes(episode)
        ranks = Ranks(episode.folder / f"start-{start}", RANKS, cluster_rank, str(episode.run_dir))
        try:
            if barrier is None and _reached(episode, before, ranks):
                with suppress(ProcessLookupError):  # the process may have just ended
                    _strike(strike, episode, ranks)
        finally:
            codes = ranks.codes(PATIENCE_S)
        assert_named(damaged, ranks.logs()[0])
        if barrier is not None and codes != [0] * RANKS:
            assert codes == [1] * RANKS and "cannot prepare" in ranks.logs()[0], ranks.logs()
            episode.happened("disk refuses", f"a file in the way, {barrier.name}")
        if barrier is not None:
            barrier.unlink(missing_ok=True)
        if codes == [0] * RANKS:
            return clean.judge(episode.run_dir, clean.store)
    raise AssertionError(f"the ranks have not finished after {MOST_STARTS} starts")


def _make_run(clean: Clean, run_dir: Path) -> None:
    (run_dir / "logs").mkdir(parents=True)
    config = load_config(clean.run_dir / "config.yaml")
    config.runs_dir = str(run_dir.parent)
    config.store.path = str(clean.store)
    save_config(config, run_dir / "config.yaml")


def _block_next_checkpoint(episode: Episode) -> Path:
    """Put a file where the next checkpoint's folder would be created; return the file's path."""
    root = episode.run_dir / "checkpoints"
    root.mkdir(exist_ok=True)
    for old in root.glob("step-*.tmp"):
        shutil.rmtree(old)
    newest = list_checkpoints(root)
    step = step_of(newest[0]) if newest else 0
    barrier = root / f"step-{step + SAVE_EVERY:08d}.tmp"
    barrier.write_text("not a folder")
    return barrier


def _reached(episode: Episode, before: int, ranks: Ranks) -> bool:
    """Wait until training advances by a random number of steps; return False if it ends first.

    Args:
        episode: The episode of the ranks.
        before: Size of the metrics file when the ranks were started. Until it grows, its last step
            may be from an earlier start whose checkpoints were damaged since.
        ranks: The running ranks.
    """
    target = last_step(episode.run_dir) + episode.random.randrange(10, 90)
    while _metrics_bytes(episode) == before or last_step(episode.run_dir) < min(target, STEPS - 5):
        if not all(process.is_alive() for process in ranks.processes):
            return False
        time.sleep(0.01)
    time.sleep(episode.random.uniform(0, 0.2))
    return True


def _metrics_bytes(episode: Episode) -> int:
    metrics = episode.run_dir / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def _strike(strike: str, episode: Episode, ranks: Ranks) -> None:
    """Inject a fault into running ranks; record it if exit codes or logs show that it struck."""
    victim = episode.random.randrange(RANKS)
    process = ranks.processes[victim]
    assert process.pid is not None
    kind, name = "", ""
    if strike in ("kill", "kill in a save"):
        if strike == "kill in a save":
            _wait_for_a_save(episode, ranks)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        left = any((episode.run_dir / "checkpoints").glob("step-*.tmp"))
        kind = "rank killed in a save" if left else "rank killed"
        struck = process.exitcode == KILLED
    elif strike == "stop":
        name = episode.random.choice(["SIGTERM", "SIGUSR1"])
        os.kill(process.pid, getattr(signal, name))
        kind, struck = "asked to stop", ranks.codes(PATIENCE_S) == [EXIT_PREEMPTED] * RANKS
    elif strike == "hang":
        kind, struck = "rank hung", _hang(victim, ranks)
    else:
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (NO_ROOM_BYTES, hard))
        codes = ranks.codes(PATIENCE_S)
        name = "no room"
        kind, struck = "disk refuses", codes[victim] in (1, CHECKPOINT_FAILED)
    if struck:
        episode.happened(kind, f"rank {victim}, process {process.pid} {name}".rstrip())
    else:
        episode.missed[kind] += 1


def _wait_for_a_save(episode: Episode, ranks: Ranks) -> None:
    root = episode.run_dir / "checkpoints"
    while not any(root.glob("step-*.tmp")) and all(p.is_alive() for p in ranks.processes):
        time.sleep(0.001)


def _hang(victim: int, ranks: Ranks) -> bool:
    """Freeze a rank, wait for the others to report the hang and end, then kill it like torchrun.

    Returns:
        True if a log reports the hang.
    """
    process = ranks.processes[victim]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    for other in ranks.processes:
        if other is not process:
            other.join(PATIENCE_S)
            assert other.exitcode is not None, f"a rank waits forever: {ranks.logs()}"
    process.kill()
    ranks.codes(PATIENCE_S)
    return any(f"no progress for {HANG_S} s" in log for log in ranks.logs())
