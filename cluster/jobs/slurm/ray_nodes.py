"""A private Ray cluster on the nodes of a Slurm job. The cluster ends with the job.

`ray symmetric-run` would suit only jobs with exclusive nodes, because at the end it stops every Ray
process that the user has on the node. Here each job has its own ports, folder and token.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from cluster.jobs.slurm.commands import is_running

_POLL_S = 0.5
_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}


def ray_environment() -> dict[str, str]:
    """Return environment variables for all Ray processes of this job, with a new token.

    srun passes them to the other nodes.
    """
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def head_address() -> str:
    """Return this node's IP address with a port that is currently free, as IP:PORT."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


@contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    """Block these signals in processes started during the `with` block, and in their children."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ray_node(address: str, head: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Ray node on this machine during the block. Kill all its processes afterwards.

    Args:
        address: Address of the head node, IP:PORT.
        head: True to start the head node; False to join the head at `address`.
    """
    # Use /tmp, not TMPDIR: Ray creates sockets in this folder, and a socket's path may have at most
    # 107 bytes.
    folder = tempfile.mkdtemp(prefix=f"ray-{os.environ['SLURM_JOB_ID']}-", dir="/tmp")
    ip, _, port = address.rpartition(":")
    where = ["--head", f"--node-ip-address={ip}", f"--port={port}", "--include-dashboard=false"]
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
        *(where if head else [f"--address={address}"]),
        f"--temp-dir={folder}",
        f"--num-cpus={os.environ.get('SLURM_CPUS_ON_NODE', os.cpu_count())}",
        f"--object-store-memory={128 << 20}",
        # Use any free ports, because another job's Ray may run on this node.
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
        *("--include-log-monitor=false", "--log-style=record", "--log-color=false"),
    ]
    with blocked(*_SIGNALS):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # hints on how to join the cluster; errors go to stderr
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # Ray's daemons are in this process group; its workers end when their raylet does.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def stand_by(address: str | None) -> None:
    """Run this job step's process on a node until standard input is closed.

    On the first node, forward Slurm's signals to the batch process, because on preemption with a
    grace period Slurm signals only the job steps. On the other nodes, run a Ray node.

    Args:
        address: Address of Ray's head, or None if the job has only one node.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    over = threading.Event()
    threading.Thread(target=_at_end_of_input, args=[over.set], daemon=True).start()
    job = os.environ["SLURM_JOB_ID"]
    first = os.environ["SLURM_NODEID"] == "0"
    with ExitStack() as stack:
        node = None
        if address is not None and not first:
            node = stack.enter_context(ray_node(address))
        while not over.is_set():
            if signal.sigtimedwait(_SIGNALS, _POLL_S) is not None and first:
                if not is_running(job):
                    return  # Slurm is ending the whole job and has signalled the batch process too
                tell = ["scancel", "--batch", "--signal=USR1", job]
                subprocess.run(tell, check=False)
            if node is not None and node.poll() is not None:
                sys.exit(
                    f"job: Ray on {socket.gethostname()} ended with exit code {node.returncode}"
                )


def _at_end_of_input(action: Callable[[], None]) -> None:
    sys.stdin.read()
    action()


def wait_for_nodes(address: str, n_nodes: int) -> None:
    """Wait until the Ray cluster at `address` has `n_nodes` nodes."""
    import ray

    while True:
        try:
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
            break
        except (ConnectionError, RuntimeError):
            time.sleep(_POLL_S)
    while sum(node["Alive"] for node in ray.nodes()) < n_nodes:
        time.sleep(_POLL_S)


def main() -> None:
    """Run `python -m cluster.jobs.slurm.ray_nodes stand_by [ADDRESS]` or `wait ADDRESS N`."""
    what, *arguments = sys.argv[1:]
    if what == "wait":
        wait_for_nodes(arguments[0], int(arguments[1]))
    else:
        stand_by(arguments[0] if arguments else None)


if __name__ == "__main__":
    main()
