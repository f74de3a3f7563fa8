"""Start real trainer ranks quickly, by forking a process that has already imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CHECKPOINT_FAILED = 3
"""Exit code of a rank that ended with a CheckpointError."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.forked_ranks", "deepspeed", "cluster.rank"])


class Ranks:
    """A group of ranks that run `body(*arguments)`, each with its rank in the environment.

    Args:
        folder: folder for the logs, `rank-N.log`.
        n_ranks: number of ranks.
        body: an importable function; its result is the exit code.
        arguments: arguments of the body; they are pickled.
    """

    def __init__(
        self, folder: Path, n_ranks: int, body: Callable[..., int], *arguments: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[BaseProcess] = []
        for rank in range(n_ranks):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(n_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
            }
            log = str(folder / f"rank-{rank}.log")
            process = _CONTEXT.Process(target=_main, args=(place, log, body, arguments))
            process.start()
            self.processes.append(process)

    def codes(self, timeout_s: float = 120) -> list[int]:
        """Wait for all ranks; return their exit codes, -N for signal N.

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
