"""What a user may set about a batch job. No heavy import here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sae_core.errors import ConfigError

SCHEDULERS = ("slurm", "ray", "kuberay", "skypilot")
_QUANTITY = re.compile(r"(\d+)([GT])i?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")


@dataclass
class SubmitConfig:
    """The job that `stage=submit` hands to the scheduler; null leaves a choice to the site."""

    scheduler: str = "slurm"
    """slurm, ray: submitted; kuberay, skypilot: written as a file that one command submits."""
    stage: str = "pipeline"
    """What the job runs."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    """With more than one the job starts Ray across them. KubeRay: nodes beside Ray's head."""
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    """CPU cores per node: a node is one task."""
    mem: str | None = None
    """Memory per node, with its unit: 64G."""
    time: str | None = None
    """Limit of one attempt, as Slurm writes it: 90 (minutes), 24:00:00, 2-00:00:00."""
    signal_lead_s: int = 150
    """Seconds before the time limit at which the job saves a checkpoint and is queued again."""
    max_requeues: int = 100
    """Times that a preempted job queues itself again; 0 never."""
    setup: list[str] = field(default_factory=list)
    """Lines for bash before the job's command: `module load cuda`; one that fails ends the job only
    if it says so: `... || exit 1`. KubeRay takes none."""
    sbatch: list[str] = field(default_factory=list)
    """More options of sbatch: `--exclusive`, `--constraint=h100`."""
    address: str = "http://127.0.0.1:8265"
    """ray: of the cluster's dashboard."""
    working_dir: str | None = None
    """ray: a folder with the code, sent to the cluster; null: the cluster has the code."""
    launch: list[str] = field(default_factory=list)
    """What the job's command begins with; empty: this Python and this launch.py, or python
    launch.py in working_dir."""
    image: str | None = None
    """kuberay, skypilot: a container image with the code, as docker/ builds it."""
    namespace: str = "default"
    """kuberay: of the job."""
    gpu: str | None = None
    """skypilot: name of the GPU (H100); kuberay: value of the label nvidia.com/gpu.product."""
    volume: str | None = None
    """Kuberay: a PersistentVolumeClaim (ReadWriteMany); skypilot: a volume. Holds runs_dir."""
    mount: str = "/runs"
    """Where the volume is mounted; runs_dir of the job."""
    shm: str = "8Gi"
    """kuberay: memory for /dev/shm of a node, as Kubernetes writes it."""
    secrets: list[str] = field(default_factory=list)
    """kuberay: Secrets whose keys become environment variables; skypilot: variables that
    `sky jobs launch --secret` passes on. Names, never values."""
    spot: bool = False
    """skypilot: on machines that may be taken back."""

    def validate(self, grace_s: float) -> None:
        """Checks the values.

        Args:
            grace_s: seconds that the run takes for its last checkpoint (`checkpoint.grace_s`).

        Raises:
            ConfigError: naming the setting that cannot be.
        """
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(
                "submit.scheduler", self.scheduler, f"one of: {', '.join(SCHEDULERS)}"
            )
        for name in ("nodes", "gpus_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"submit.{name}", value, "at least 1")
        if self.max_requeues < 0:
            raise ConfigError("submit.max_requeues", self.max_requeues, "0 or more")
        self._validate_times(grace_s)
        self._validate_words()
        if self.scheduler == "ray" and not self.address.startswith(("http://", "https://")):
            raise ConfigError("submit.address", self.address, "as http://127.0.0.1:8265")
        if self.scheduler in ("kuberay", "skypilot"):
            self._validate_containers()
        if self.scheduler == "kuberay":
            self._validate_kuberay()

    def _validate_times(self, grace_s: float) -> None:
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ConfigError("submit.time", self.time, "a time of Slurm's, as 24:00:00")
        if self.time is not None and _seconds(self.time) <= 2 * self.signal_lead_s:
            raise ConfigError(
                "submit.time",
                self.time,
                f"more than twice submit.signal_lead_s={self.signal_lead_s}",
                "every attempt would be asked to stop before it has done much",
            )
        if self.signal_lead_s < grace_s:
            raise ConfigError(
                "submit.signal_lead_s",
                self.signal_lead_s,
                f"at least checkpoint.grace_s={grace_s:g}",
                "the job would be killed in the middle of its last checkpoint",
            )

    def _validate_words(self) -> None:
        for option in self.sbatch:
            if not option.startswith("-"):
                raise ConfigError("submit.sbatch", option, "options of sbatch, as --exclusive")
        words = (self.partition, self.account, self.qos, self.mem, *self.sbatch)
        for word in words:
            if word is not None and "\n" in word:
                raise ConfigError("submit", word, "options of one line each")

    def _validate_kuberay(self) -> None:
        for name in ("cpus_per_task", "mem"):
            if getattr(self, name) is None:
                raise ConfigError(f"submit.{name}", None, "CPU cores and memory of a node")
        if self.setup:
            raise ConfigError(
                "submit.setup", self.setup, "no lines: KubeRay runs the image as it is built"
            )

    def _validate_containers(self) -> None:
        for name in ("image", "volume"):
            if not getattr(self, name):
                raise ConfigError(
                    f"submit.{name}", getattr(self, name), f"a name: {self.scheduler} needs one"
                )
        if not self.launch:
            raise ConfigError(
                "submit.launch", [], "the command in the image, as [python,/app/launch.py]"
            )
        for name in ("mem", "shm"):
            value = getattr(self, name)
            if value is not None and not _QUANTITY.fullmatch(value):
                raise ConfigError(f"submit.{name}", value, "a number of Gi, G, Ti or T, as 64Gi")
        if self.scheduler == "skypilot" and (self.gpu is None) != (self.gpus_per_node is None):
            raise ConfigError("submit.gpu", self.gpu, "together with submit.gpus_per_node")
        if not self.mount.startswith("/"):
            raise ConfigError("submit.mount", self.mount, "an absolute path")
        pattern = _LABEL if self.scheduler == "kuberay" else _VARIABLE
        for secret in self.secrets:
            if not pattern.fullmatch(secret):
                raise ConfigError("submit.secrets", "***", "names, as WANDB_API_KEY, no values")
        if not _LABEL.fullmatch(self.namespace):
            raise ConfigError("submit.namespace", self.namespace, "a name of Kubernetes's")


def gigabytes(quantity: str) -> int:
    """Of memory as `submit.mem` has it where nodes are containers."""
    found = _QUANTITY.fullmatch(quantity)
    assert found is not None, "validated"
    return int(found[1]) * (1024 if found[2] == "T" else 1)


def _seconds(time: str) -> int:
    """Of a time as Slurm reads it: minutes[:seconds], hours:minutes:seconds, or days-hours[...]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    first_unit_s = 3600 if dash or len(parts) == 3 else 60
    units_s = (first_unit_s, first_unit_s // 60, first_unit_s // 3600)
    return int(days or 0) * 86_400 + sum(n * unit for n, unit in zip(parts, units_s, strict=False))
