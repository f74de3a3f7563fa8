"""Inject random faults into tiny runs, which must end like a run without faults.

    python -m tests.soak --minutes 20 --seed 0 --json FILE

An episode is one run: its processes are killed, frozen or asked to stop, its files are damaged and
its disk is full. The same command is repeated until it succeeds. Then the run is compared with a
run without faults: the store row by row, and the weights, moments and ages bit by bit. The seed
determines which faults are drawn, but what they hit depends on the timing of the processes. The
exit code is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.table import format_table
from cluster.run_folder.environment import environment
from tests.soak.pipeline import link_episode, pipeline_episode
from tests.soak.ranks import ranks_episode
from tests.soak.run import Clean, Episode, Verdict

FAMILIES: dict[str, Callable[[Clean, Episode], Verdict]] = {
    "pipeline": pipeline_episode,
    "ranks": ranks_episode,
    "link": link_episode,
}
TURNS = ("ranks", "pipeline", "ranks", "pipeline", "link", "ranks", "pipeline")
KILLS = ("killed", "node lost")
"""The kind of every fault that ends a process contains one of these."""
REPLIES = "reply"
"""Prefix of the kinds of object-store faults, which are too frequent to include in the total."""


def soak(work: Path, minutes: float, seed: int, families: tuple[str, ...]) -> list[dict[str, Any]]:
    """Run episodes until the time is up; return a row for each episode.

    The folder of a failed episode is kept.

    Args:
        work: Folder for all runs.
        minutes: No episode starts after this time, counted from the end of the clean run. At least
            one episode runs, because success after none would prove nothing.
        seed: Determines the faults that are drawn.
        families: Kinds of episodes, taken in turn.
    """
    clean = Clean(work)
    rows = []
    end = time.monotonic() + 60 * minutes
    for number, family in enumerate(itertools.cycle(families)):
        if time.monotonic() > end:
            break
        folder = work / f"{number}-{family}"
        folder.mkdir()
        episode = Episode(folder, random.Random(f"{seed} {number}"))
        row = {"episode": number, "family": family, **run_episode(family, clean, episode)}
        print(summary(row), flush=True)
        if row["good"]:
            shutil.rmtree(folder)
        rows.append(row)
    return rows


def run_episode(family: str, clean: Clean, episode: Episode) -> dict[str, Any]:
    """Run one episode; return its faults and how its end compares with the clean run's."""
    began = time.monotonic()
    verdict, problem = None, ""
    try:
        verdict = FAMILIES[family](clean, episode)
    except Exception:  # record any failure, so that the next episode runs
        problem = traceback.format_exc()
    return {
        "seconds": round(time.monotonic() - began, 1),
        "faults": [asdict(fault) for fault in episode.faults],
        "missed": dict(episode.missed),
        "verdict": asdict(verdict) if verdict else None,
        "good": verdict is not None and verdict.good,
        "problem": problem,
    }


def summary(row: dict[str, Any]) -> str:
    """Return one line about an episode; if it failed, also the traceback."""
    line = (
        f"episode {row['episode']}, {row['family']}: {len(row['faults'])} faults in "
        f"{row['seconds']:.0f} s, {row['verdict'] or 'did not finish'}"
    )
    return line if row["good"] else f"{line}\n{row['problem']}"


def table(episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each kind of fault, based on the episodes with it, and two total rows."""
    kinds = sorted({fault["kind"] for row in episodes for fault in row["faults"]})
    rows = [_row(kind, episodes, kind.__eq__) for kind in kinds]
    rows.append(_row("process kills", episodes, lambda found: any(k in found for k in KILLS)))
    rows.append(_row("all but replies", episodes, lambda found: not found.startswith(REPLIES)))
    return rows


def _row(
    kind: str, episodes: list[dict[str, Any]], counts: Callable[[str], bool]
) -> dict[str, Any]:
    struck = [row for row in episodes if any(counts(fault["kind"]) for fault in row["faults"])]
    ended = [row["verdict"] for row in struck if row["verdict"]]
    return {
        "fault": kind,
        "injected": sum(counts(f["kind"]) for row in episodes for f in row["faults"]),
        "runs": len(struck),
        "rows_lost": sum(verdict["rows_lost"] for verdict in ended),
        "rows_doubled": sum(verdict["rows_doubled"] for verdict in ended),
        "store_equal": sum(verdict["store_equal"] for verdict in ended),
        "weights_equal": sum(verdict["weights_equal"] for verdict in ended),
    }


def main() -> None:
    """Run the soak, print the table and write it as JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="start episodes for this long; more than 0"
    )
    parser.add_argument("--seed", type=int, default=0, help="determines the faults")
    parser.add_argument("--json", type=Path, help="write the rows and episodes to this file")
    parser.add_argument("--only", choices=FAMILIES, nargs="*", help="run only these episodes")
    parser.add_argument("--folder", type=Path, help="parent of the folder for the runs")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:  # unlike `<= 0`, this also refuses NaN
        parser.error(f"--minutes={arguments.minutes:g}: must be more than 0, to run an episode")
    families = tuple(arguments.only or TURNS)
    work = Path(tempfile.mkdtemp(prefix="soak-", dir=arguments.folder))
    began = time.monotonic()
    episodes = soak(work, arguments.minutes, arguments.seed, families)
    rows = table(episodes)
    print(format_table(rows, tuple(rows[0])))
    missed = sum((Counter(row["missed"]) for row in episodes), Counter())
    print(f"not counted, because the target had already ended: {dict(missed)}")
    if arguments.json:
        seconds = round(time.monotonic() - began)
        found = {**environment(), "seed": arguments.seed, "seconds": seconds, "rows": rows}
        arguments.json.write_text(json.dumps({**found, "episodes": episodes}, indent=1) + "\n")
    if not all(row["good"] for row in episodes):
        sys.exit(f"at least one episode failed: see the lines above and the folders in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
