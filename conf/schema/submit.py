"""Settings of a batch job.

Every command imports this file, so it must not import anything slow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from foundation.errors import ConfigError

SCHEDULERS = ("slurm", "ray", "kuberay", "skypilot")
_QUANTITY = re.compile(r"(\d+)([GT])i?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")


@dataclass
class SubmitConfig:
    """The job that `stage=submit` hands to the scheduler.

    Where a setting is null, the scheduler's default applies unless its help says otherwise.
    """

    scheduler: str = "slurm"
    """slurm and ray: submit the job. kuberay and skypilot: write a job file and print the command
    that submits it."""
    stage: str = "pipeline"
    """The stage that the job runs."""
    partition: str | None = None
    """slurm: partition to submit to."""
    account: str | None = None
    """slurm: account to charge."""
    qos: str | None = None
    """slurm: quality of service."""
    nodes: int = 1
    """Number of nodes. With more than one, the job starts Ray across them. kuberay: the node of
    Ray's head is not counted."""
    gpus_per_node: int | None = None
    """GPUs on each node."""
    cpus_per_task: int | None = None
    """CPU cores on each node, as the job has one task per node."""
    mem: str | None = None
    """Memory of each node, with its unit: 64G."""
    time: str | None = None
    """slurm: time limit of one attempt in Slurm's format: 90 (minutes), 24:00:00, 2-00:00:00."""
    signal_lead_s: int = 150
    """slurm: seconds before the time limit at which the job saves a checkpoint and is requeued.
    ray: seconds that a stopped job has to save a checkpoint."""
    max_requeues: int = 100
    """How often a preempted job is requeued. 0: never."""
    setup: list[str] = field(default_factory=list)
    """Bash lines to run before the job's command, such as `module load cuda`. If a line fails, the
    job continues unless the line ends with `|| exit 1`. Not supported by kuberay."""
    sbatch: list[str] = field(default_factory=list)
    """slurm: further options of sbatch, such as `--exclusive` or `--constraint=h100`."""
    address: str = "http://127.0.0.1:8265"
    """ray: address of the cluster's dashboard."""
    working_dir: str | None = None
    """ray: a folder with the code that is uploaded to the cluster. Null: the cluster already has
    the code, at the same path."""
    launch: list[str] = field(default_factory=list)
    """First words of the job's command, such as [python, /app/launch.py]. Empty: this Python and
    this launch.py, or `python launch.py` if working_dir is set. Required by kuberay and
    skypilot."""
    image: str | None = None
    """kuberay, skypilot: container image with the code; docker/ builds one. Required."""
    namespace: str = "default"
    """kuberay: namespace of the job."""
    gpu: str | None = None
    """skypilot: name of the GPU, such as H100. kuberay: value of the node label
    nvidia.com/gpu.product."""
    volume: str | None = None
    """kuberay: name of a PersistentVolumeClaim (ReadWriteMany). skypilot: name of a volume. It
    stores the runs and the cache. Required."""
    mount: str = "/runs"
    """kuberay, skypilot: where the volume is mounted. The job uses it as runs_dir."""
    shm: str = "8Gi"
    """kuberay: size of /dev/shm on each node, with its unit: 8Gi."""
    secrets: list[str] = field(default_factory=list)
    """kuberay: names of Secrets whose keys become environment variables. skypilot: names of
    variables to pass on with `sky jobs launch --secret`. Give names only, never values."""
    spot: bool = False
    """skypilot: use spot instances, which the cloud may take back at any time."""

    def validate(self, grace_s: float) -> None:
        """Validate all fields.

        Args:
            grace_s: Seconds that the run may take for its last checkpoint (`checkpoint.grace_s`).

        Raises:
            ConfigError: If a field is invalid; the error names it.
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
            raise ConfigError(
                "submit.address",
                self.address,
                "an http or https address, such as http://127.0.0.1:8265",
            )
        if self.scheduler in ("kuberay", "skypilot"):
            self._validate_containers()
        if self.scheduler == "kuberay":
            self._validate_kuberay()

    def _validate_times(self, grace_s: float) -> None:
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ConfigError(
                "submit.time", self.time, "a time in Slurm's format, such as 24:00:00"
            )
        if self.time is not None and _seconds(self.time) <= 2 * self.signal_lead_s:
            raise ConfigError(
                "submit.time",
                self.time,
                f"more than twice submit.signal_lead_s={self.signal_lead_s} seconds",
                "use a longer time, or every attempt is asked to stop soon after its start",
            )
        if self.signal_lead_s < grace_s:
            raise ConfigError(
                "submit.signal_lead_s",
                self.signal_lead_s,
                f"at least checkpoint.grace_s={grace_s:g}",
                "raise it, or the job may be killed while it saves its last checkpoint",
            )

    def _validate_words(self) -> None:
        for option in self.sbatch:
            if not option.startswith("-"):
                raise ConfigError(
                    "submit.sbatch", option, "an option of sbatch, such as --exclusive"
                )
        words = (self.partition, self.account, self.qos, self.mem, *self.sbatch)
        for word in words:
            if word is not None and "\n" in word:
                raise ConfigError("submit", word, "a text of one line", "remove the line break")

    def _validate_kuberay(self) -> None:
        for name in ("cpus_per_task", "mem"):
            if getattr(self, name) is None:
                raise ConfigError(
                    f"submit.{name}", None, "a value", "set the CPU cores and memory of a node"
                )
        if self.setup:
            raise ConfigError(
                "submit.setup",
                self.setup,
                "no lines with submit=kuberay",
                "put the setup into the image",
            )

    def _validate_containers(self) -> None:
        for name in ("image", "volume"):
            if not getattr(self, name):
                raise ConfigError(
                    f"submit.{name}", getattr(self, name), f"a name, as {self.scheduler} needs one"
                )
        if not self.launch:
            raise ConfigError(
                "submit.launch", [], "the command in the image, such as [python,/app/launch.py]"
            )
        for name in ("mem", "shm"):
            value = getattr(self, name)
            if value is not None and not _QUANTITY.fullmatch(value):
                raise ConfigError(
                    f"submit.{name}", value, "a whole number of Gi, G, Ti or T, such as 64Gi"
                )
        if self.scheduler == "skypilot" and (self.gpu is None) != (self.gpus_per_node is None):
            raise ConfigError(
                "submit.gpu",
                self.gpu,
                "a value if and only if submit.gpus_per_node has one",
                "set both or neither",
            )
        if not self.mount.startswith("/"):
            raise ConfigError("submit.mount", self.mount, "an absolute path")
        pattern = _LABEL if self.scheduler == "kuberay" else _VARIABLE
        for secret in self.secrets:
            if not pattern.fullmatch(secret):
                # The value is masked: it may be a secret that was given instead of its name.
                raise ConfigError("submit.secrets", "***", "names of secrets, not their values")
        if not _LABEL.fullmatch(self.namespace):
            raise ConfigError("submit.namespace", self.namespace, "a valid Kubernetes name")


def gigabytes(quantity: str) -> int:
    """Return the number of gigabytes in a quantity such as `64Gi`, as containers use it."""
    found = _QUANTITY.fullmatch(quantity)
    assert found is not None, "validated"
    return int(found[1]) * (1024 if found[2] == "T" else 1)


def _seconds(time: str) -> int:
    """Convert Slurm's time formats to seconds.

    They are minutes[:seconds], hours:minutes:seconds, and days-hours[:minutes[:seconds]].
    """
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    first_unit_s = 3600 if dash or len(parts) == 3 else 60
    units_s = (first_unit_s, first_unit_s // 60, first_unit_s // 3600)
    return int(days or 0) * 86_400 + sum(n * unit for n, unit in zip(parts, units_s, strict=False))
