"""The batch process of a Slurm job: it starts the driver and forwards Slurm's signals to it.

It runs on the job's first node. Slurm ends a job in one of three ways:

- It signals only the batch process, when the time limit is near (`--signal=B:USR1`).
- It sends SIGTERM to all job steps, on preemption with a grace period.
- It sends SIGTERM to every process of the job and kills them `KillWait` seconds later, on scancel,
requeue, or preemption without a grace period.

In each case the driver must receive exactly one SIGUSR1, and Ray must receive no signal at all. A
job step (`ray_nodes.stand_by`) therefore waits for the second kind of signal. The driver starts
with SIGTERM blocked, and its child processes inherit the blocked signal.
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

from cluster.errors import SchedulerError
from cluster.jobs.slurm import commands
from cluster.jobs.slurm.ray_nodes import blocked, head_address, ray_environment, ray_node
from cluster.run_folder.submitted_jobs import FOLDER
from foundation.errors import EXIT_PREEMPTED

ATTEMPTS = "attempts.jsonl"
"""File in the run's `submit/` with a row for the start and the end of each attempt."""
_POLL_S = 0.2
_NODES_TIMEOUT_S = 300


class Attempt:
    """One attempt of the job. After a requeue, Slurm starts another attempt under the same id.

    Args:
        run_dir: Folder of the run.
        command: Command of the driver.
    """

    def __init__(self, run_dir: Path, command: list[str]) -> None:
        self.job = os.environ["SLURM_JOB_ID"]
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.n_nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        self.signalled = False
        self._run_dir = run_dir
        self._command = command
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.signalled = True

    def run(self) -> int:
        """Run the driver and return its exit code.

        The code is also 75 (preempted) if a signal arrived before the driver could handle it.
        """
        self._record("start", nodes=os.environ.get("SLURM_JOB_NODELIST"))
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
            if address is None or self._wait_for_nodes(address):
                code = EXIT_PREEMPTED if self.signalled else self._run_driver(command)
            elif self.signalled:
                code = EXIT_PREEMPTED
            # Record the end before stopping Ray, which takes time: Slurm may kill the job first.
            self._record("end", exit_code=code)
        return code

    def _record(self, event: str, **more: Any) -> None:
        """Append a row to the attempts file, which `stage=status` reads if Slurm forgot the job."""
        row = {"time": time.time(), "job": self.job, "restart": self.restarts, "event": event}
        with open(self._run_dir / FOLDER / ATTEMPTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row | more) + "\n")

    def _wait_for_nodes(self, address: str) -> bool:
        """Wait until all nodes have joined Ray. Return False on a signal or after a timeout."""
        # Wait in a separate process, because that can be killed and a blocking call into Ray
        # cannot.
        wait = [
            sys.executable,
            "-m",
            "cluster.jobs.slurm.ray_nodes",
            "wait",
            address,
            str(self.n_nodes),
        ]
        waiting = subprocess.Popen(wait)
        deadline = time.monotonic() + _NODES_TIMEOUT_S
        while waiting.poll() is None:
            if self.signalled or time.monotonic() > deadline:
                print(
                    f"job: stopped waiting for {self.n_nodes} nodes to join Ray, because a signal "
                    f"arrived or {_NODES_TIMEOUT_S} s passed",
                    flush=True,
                )
                waiting.kill()
            time.sleep(_POLL_S)
        return waiting.returncode == 0

    def _run_driver(self, command: list[str]) -> int:
        """Run the driver, send it one SIGUSR1 if Slurm signals, and return its exit code."""
        with blocked(signal.SIGTERM):
            driver = subprocess.Popen(command)
        forwarded = False
        while driver.poll() is None:
            if self.signalled and not forwarded:
                driver.send_signal(signal.SIGUSR1)
                forwarded = True
            time.sleep(_POLL_S)
        if forwarded and driver.returncode == -signal.SIGUSR1:
            return EXIT_PREEMPTED  # the signal came before the driver had installed its handler
        return driver.returncode


@contextmanager
def _steps(address: str | None, n_nodes: int) -> Iterator[None]:
    """Run `cluster.jobs.slurm.ray_nodes.stand_by` on each node until the block ends."""
    srun = ["srun", "--overlap", f"--nodes={n_nodes}", f"--ntasks={n_nodes}", "--ntasks-per-node=1"]
    # Give the step all of the job's memory and cores, and keep the other nodes when one fails.
    srun += ["--mem=0", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0"]
    if "SLURM_CPUS_PER_TASK" in os.environ:
        srun.append(f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}")
    stand_by = [
        sys.executable,
        "-m",
        "cluster.jobs.slurm.ray_nodes",
        "stand_by",
        *filter(None, [address]),
    ]
    step = subprocess.Popen([*srun, *stand_by], stdin=subprocess.PIPE)
    assert step.stdin is not None
    try:
        yield
    finally:
        step.stdin.close()  # tells the processes on all nodes to end
        try:
            step.wait(timeout=30)
        except subprocess.TimeoutExpired:
            step.kill()


def main() -> None:
    """Run `python -m cluster.jobs.slurm.job RUN_DIR MAX_REQUEUES -- COMMAND...`."""
    run_dir, max_requeues, _, *command = sys.argv[1:]
    attempt = Attempt(Path(run_dir), command)
    code = attempt.run()
    requeue = code == EXIT_PREEMPTED and attempt.restarts < int(max_requeues)
    if requeue:
        try:
            commands.requeue(attempt.job)
        except SchedulerError as error:
            print(f"job: could not requeue: {error}; rerun stage=submit to resume", flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
