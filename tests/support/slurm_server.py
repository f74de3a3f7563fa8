"""A private Slurm on 127.0.0.1: one controller, two nodes on this machine, preemption.

It neither reads nor writes the files of any Slurm installed on the machine. Its configuration,
munge key and socket, spools and logs are in one folder, and `SLURM_CONF` points all clients to that
folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.ranks import free_ports

NODES = ("n1", "n2")
GRACE_S, KILL_WAIT_S = 60, 30
_NEEDED = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_CONF = """
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its old credentials to expire: seconds here, two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait={kill_wait}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=off
"""


def why_not() -> str:
    """Return why Slurm cannot be started on this machine, or an empty string if it can."""
    if os.geteuid():
        return "needs root to start a private Slurm"
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    return f"needs slurm-wlm and munge; not found: {', '.join(missing)}" if missing else ""


@contextmanager
def slurm_server() -> Iterator[Path]:
    """Run a private Slurm during the block, with `SLURM_CONF` set; yield its folder, with logs."""
    with ExitStack() as stack:
        # munged rejects folders inside a folder that other users may write to, like pytest's.
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        conf = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        conf.write_text(
            _CONF.format(
                folder=folder,
                host=host,
                ports=free_ports(1 + len(NODES)),
                kill_wait=KILL_WAIT_S,
                grace=GRACE_S,
            )
        )
        before = os.environ.get("SLURM_CONF")
        stack.callback(_set_conf, before)
        _set_conf(str(conf))
        _start_munge(stack, folder)
        _daemon(stack, folder, "slurmctld", "-D", "-f", str(conf))
        wait_until(lambda: "UP" in _output("scontrol", "ping"), "slurmctld did not start", folder)
        for node in NODES:
            _daemon(stack, folder, "slurmd", "-D", "-N", node, "-f", str(conf))
        wait_until(_nodes_idle, "the nodes did not become idle", folder)
        stack.callback(_end_jobs)
        yield folder


def wait_until(
    condition: Callable[[], object], what: str, folder: Path | None = None, timeout_s: float = 300
) -> None:
    """Wait for a condition.

    Args:
        condition: Returns a true value when it is met.
        what: Error text if it is not met in time.
        folder: Slurm's folder; the ends of its logs are added to the error text.
        timeout_s: Time limit.

    Raises:
        AssertionError: If the condition is not met within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            logs = sorted(folder.glob("*.log")) if folder else []
            tails = "".join(f"\n{log.name}: {log.read_text()[-1500:]}" for log in logs)
            raise AssertionError(what + tails)
        time.sleep(0.1)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _start_munge(stack: ExitStack, folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    files = {"key": key.name, "socket": "munge.socket", "pid": "munged.pid", "seed": "munge.seed"}
    paths = [
        f"--{name}{'' if name == 'socket' else '-file'}={folder / file}"
        for name, file in files.items()
    ]
    _daemon(stack, folder, "munged", "-F", *paths)
    wait_until((folder / "munge.socket").exists, "munged did not start", folder)


def _daemon(stack: ExitStack, folder: Path, name: str, *arguments: str) -> None:
    number = len(list(folder.glob(f"{name}*.out")))
    with open(folder / f"{name}-{number}.out", "wb") as log:
        process = subprocess.Popen([name, *arguments], stdout=log, stderr=log)
    stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _nodes_idle() -> bool:
    states = _output("sinfo", "--noheader", "--Node", "--format=%N %T").split("\n")
    return {f"{node} idle" for node in NODES} <= set(states)


def _end_jobs() -> None:
    """End all jobs while the daemons still run; jobs would outlive the daemons."""
    _output("scancel", "--signal=KILL", "--full", "--user=root")
    _output("scancel", "--user=root")
    deadline = time.monotonic() + 15
    while _output("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.2)


def _set_conf(path: str | None) -> None:
    if path is None:
        os.environ.pop("SLURM_CONF", None)
    else:
        os.environ["SLURM_CONF"] = path
