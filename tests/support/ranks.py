"""Start groups of real ranks on this machine.

Ranks start in milliseconds: they are forked from a process that has already imported everything.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CHECKPOINT_FAILED = 3
"""Exit code of a rank that ended with a CheckpointError."""
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = (
    *("tests.support.ranks", "deepspeed", "cluster.rank"),
    # The first optimiser and the first engine of a process import these: seconds for each rank.
    *("torch._dynamo", "deepspeed.module_inject.auto_ep_config"),
)
_CONTEXT.set_forkserver_preload(list(_PRELOADED))


def free_ports(count: int) -> list[int]:
    """Return distinct TCP ports of this machine that are free now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def free_port() -> int:
    """Return a TCP port of this machine that is free now."""
    return free_ports(1)[0]


def rank_environment(rank: int, n_ranks: int, port: int) -> dict[str, str]:
    """Return the environment variables of one CPU rank, as torchrun sets them on one machine.

    Args:
        rank: Number of the rank in the group, from 0.
        n_ranks: Size of the group.
        port: Port on which the ranks meet.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def torchrun_command(run_dir: Path, n_ranks: int) -> list[str]:
    """Return the command line that starts `cluster.rank` for a run under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(n_ranks), "-m", "cluster.rank", str(run_dir)]


def cluster_rank(run_dir: str, *cells: str) -> int:
    """Do the same as `python -m cluster.rank RUN_DIR [CELL ...]`, as the `body` of `Ranks`."""
    from cluster import rank

    sys.argv = ["rank", run_dir, *cells]
    rank.main()
    return 0


class Ranks:
    """A group of ranks that run `body(*arguments)`, each with its rank in the environment.

    Args:
        folder: Folder for the logs, `rank-N.log`.
        n_ranks: Number of ranks.
        body: An importable function; its result is the exit code.
        arguments: Arguments of the body; they are pickled.
    """

    def __init__(
        self, folder: Path, n_ranks: int, body: Callable[..., int], *arguments: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        port = free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(n_ranks):
            place = rank_environment(rank, n_ranks, port)
            log = str(folder / f"rank-{rank}.log")
            process = _CONTEXT.Process(target=_main, args=(place, log, body, arguments))
            process.start()
            self.processes.append(process)

    def codes(self, timeout_s: float = 120) -> list[int]:
        """Wait for all ranks and return their exit codes, -N for signal N.

        Raises:
            AssertionError: If a rank still runs after `timeout_s`.
        """
        try:
            for process in self.processes:
                process.join(timeout_s)
            ended = all(p.exitcode is not None for p in self.processes)
            assert ended, f"a rank still runs after {timeout_s} s: {self.logs()}"
        finally:
            for process in self.processes:
                process.kill()
        return [int(p.exitcode or 0) for p in self.processes]

    def logs(self) -> list[str]:
        """Return the output of each rank so far."""
        paths = [self.folder / f"rank-{rank}.log" for rank in range(len(self.processes))]
        return [path.read_text() for path in paths]


def _main(
    place: dict[str, str], log: str, body: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(place)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    from sae_core.errors import CheckpointError

    code = 1
    try:
        code = body(*arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except CheckpointError:
        traceback.print_exc()
        code = CHECKPOINT_FAILED
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
