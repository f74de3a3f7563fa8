"""Inside a Slurm job, on its first node: starts the driver, and passes on what Slurm says.

Slurm takes its machines back in three ways. It signals the batch process alone (the time limit is
near: `--signal=B:USR1`). It sends SIGTERM to all job steps (preemption with a grace period). It
sends SIGTERM to every process of the job and kills them `KillWait` seconds later (scancel, requeue,
preemption without grace). In each the driver is to hear of it once, as SIGUSR1, and Ray not at all:
so a job step that does nothing else stands by for the second, and the driver is started with
SIGTERM blocked, which its children inherit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cluster import slurm
from cluster.errors import SchedulerError
from cluster.preemption import EXIT_PREEMPTED
from cluster.slurm_ray import blocked, head_address, ray_environment, ray_node
from cluster.submitted import FOLDER

_POLL_S = 0.2
_NODES_TIMEOUT_S = 300


class Attempt:
    """One run of the job; Slurm may start another under the same id.

    Args:
        run_dir: the run's folder.
        command: the driver's.
    """

    def __init__(self, run_dir: Path, command: list[str]) -> None:
        self.job = os.environ["SLURM_JOB_ID"]
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.n_nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        self.asked = False
        self._run_dir, self._command = run_dir, command
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = True

    def run(self) -> int:
        """The driver's exit code; 75 also where it never came to take the signal."""
        self._note("start", nodes=os.environ.get("SLURM_JOB_NODELIST"))
        with ExitStack() as stack:
            command = self._command
            address = None
            if self.n_nodes > 1:
                os.environ.update(ray_environment())
                address = head_address()
                stack.enter_context(ray_node(address, head=True))
                command = [*command, f"cluster.address={address}"]
            stack.enter_context(_steps(address, self.n_nodes))
            code = 1
            if address is None or self._nodes_came(address):
                code = EXIT_PREEMPTED if self.asked else self._drive(command)
            elif self.asked:
                code = EXIT_PREEMPTED
            # Before Ray's end: Slurm may kill what is left of the job while that takes its time.
            self._note("end", exit_code=code)
        return code

    def _note(self, event: str, **more: Any) -> None:
        """A row for `stage=status`, for when Slurm has forgotten the job."""
        row = {"time": time.time(), "job": self.job, "restart": self.restarts, "event": event}
        with open(self._run_dir / FOLDER / slurm.ATTEMPTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row | more) + "\n")

    def _nodes_came(self, address: str) -> bool:
        wait = [sys.executable, "-m", "cluster.slurm_ray", "wait", address, str(self.n_nodes)]
        waiting = subprocess.Popen(wait)
        deadline = time.monotonic() + _NODES_TIMEOUT_S
        while waiting.poll() is None:
            if self.asked or time.monotonic() > deadline:
                print(f"job: gave up waiting for Ray on {self.n_nodes} nodes", flush=True)
                waiting.kill()
            time.sleep(_POLL_S)
        return waiting.returncode == 0

    def _drive(self, command: list[str]) -> int:
        with blocked(signal.SIGTERM):
            driver = subprocess.Popen(command)
        told = False
        while driver.poll() is None:
            if self.asked and not told:
                driver.send_signal(signal.SIGUSR1)
                told = True
            time.sleep(_POLL_S)
        if told and driver.returncode == -signal.SIGUSR1:
            return EXIT_PREEMPTED  # it had not begun
        return driver.returncode


@contextmanager
def _steps(address: str | None, n_nodes: int) -> Iterator[None]:
    """A process per node, until the block ends: see `cluster.slurm_ray.stand_by`."""
    srun = ["srun", "--overlap", f"--nodes={n_nodes}", f"--ntasks={n_nodes}", "--ntasks-per-node=1"]
    # All that the job has on each node; one node's end is not to end the others.
    srun += ["--mem=0", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0"]
    if "SLURM_CPUS_PER_TASK" in os.environ:
        srun.append(f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}")
    stand_by = [sys.executable, "-m", "cluster.slurm_ray", "stand_by", *filter(None, [address])]
    step = subprocess.Popen([*srun, *stand_by], stdin=subprocess.PIPE)
    assert step.stdin is not None
    try:
        yield
    finally:
        step.stdin.close()  # the steps' sign to end
        try:
            step.wait(timeout=30)
        except subprocess.TimeoutExpired:
            step.kill()


def main() -> None:
    """`python -m cluster.slurm_job RUN_DIR MAX_REQUEUES -- COMMAND...`, of the batch script."""
    run_dir, max_requeues, _, *command = sys.argv[1:]
    attempt = Attempt(Path(run_dir), command)
    code = attempt.run()
    again = code == EXIT_PREEMPTED and attempt.restarts < int(max_requeues)
    if again:
        try:
            slurm.requeue(attempt.job)
        except SchedulerError as error:
            print(f"job: cannot be queued again: {error}; submit it again to resume", flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
