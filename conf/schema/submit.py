"""Settings of a batch job.

Every command imports this file, so it must not import anything slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from foundation.errors import ConfigError


@dataclass
class SubmitConfig:
    """The job that `stage=submit` hands to a job backend, such as a scheduler.

    If a setting is null, the scheduler's default applies, unless the setting's description says
    otherwise. Backend names before a colon are the only built-in backends that use the setting; the
    others ignore it.
    """

    scheduler: str = "slurm"
    """Name of the job backend. slurm and ray submit the job; kuberay and skypilot write a job file
    and print the command that submits it. Installed packages may add others."""
    stage: str = "pipeline"
    """The stage that the job runs."""
    partition: str | None = None
    """slurm: partition to submit to."""
    account: str | None = None
    """slurm: account to charge."""
    qos: str | None = None
    """slurm: quality of service."""
    nodes: int = 1
    """slurm, kuberay, skypilot: number of nodes. With more than one, the job starts a Ray cluster
    that spans all of them. For kuberay, the node of Ray's head is not counted."""
    gpus_per_node: int | None = None
    """slurm, kuberay, skypilot: number of GPUs on each node."""
    cpus_per_task: int | None = None
    """slurm, kuberay, skypilot: number of CPU cores on each node, because the job has one task per
    node. Required by kuberay."""
    mem: str | None = None
    """slurm, kuberay, skypilot: memory of each node with a unit, such as 64G. Required by
    kuberay."""
    time: str | None = None
    """slurm: time limit of one attempt in Slurm's format, such as 90 (minutes), 24:00:00 or
    2-00:00:00."""
    signal_lead_s: int = 150
    """slurm: how many seconds before the time limit the job saves a checkpoint and is requeued.
    ray: number of seconds that a stopped job has to save a checkpoint."""
    max_requeues: int = 100
    """slurm, kuberay, skypilot: maximum number of times that a preempted job is requeued."""
    setup: list[str] = field(default_factory=list)
    """slurm, ray, skypilot: bash lines to run before the job's command, such as `module load cuda`.
    If a line fails, the job continues unless the line ends with `|| exit 1`. kuberay rejects this
    setting."""
    sbatch: list[str] = field(default_factory=list)
    """slurm: additional options for sbatch, such as `--exclusive` or `--constraint=h100`."""
    address: str = "http://127.0.0.1:8265"
    """ray: address of the cluster's dashboard."""
    working_dir: str | None = None
    """ray: folder with the code, to be uploaded to the cluster. If null, the cluster must already
    have the code at the same path as this machine."""
    launch: list[str] = field(default_factory=list)
    """First words of the job's command, such as [python, /app/launch.py]. If empty, the job uses
    this Python and this launch.py, or `python launch.py` if working_dir is set. Required by kuberay
    and skypilot."""
    image: str | None = None
    """kuberay, skypilot: container image with the code, such as the one built from docker/.
    Required."""
    namespace: str = "default"
    """kuberay: namespace of the job."""
    gpu: str | None = None
    """skypilot: name of the GPU, such as H100. kuberay: value of the node label
    nvidia.com/gpu.product."""
    volume: str | None = None
    """kuberay: name of a PersistentVolumeClaim (ReadWriteMany). skypilot: name of a volume. The
    volume stores the runs and the cache. Required by both."""
    mount: str = "/runs"
    """kuberay, skypilot: path at which the volume is mounted. The job uses this path as
    runs_dir."""
    shm: str = "8Gi"
    """kuberay: size of /dev/shm on each node with a unit, such as 8Gi."""
    secrets: list[str] = field(default_factory=list)
    """kuberay: names of Secrets whose keys become environment variables. skypilot: names of
    environment variables to pass to the job with `sky jobs launch --secret`. Give only names, never
    values."""
    spot: bool = False
    """skypilot: use spot instances, which the cloud may reclaim at any time."""

    def validate(self) -> None:
        """Validate the fields whose meaning is the same for all backends.

        When the submit stage begins, the chosen backend validates the other fields that it uses
        (`JobBackend.check` in `cluster.jobs.backend`).

        Raises:
            ConfigError: If a field is invalid. The message names the field.
        """
        for name in ("nodes", "gpus_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"submit.{name}", value, "at least 1")
        if self.max_requeues < 0:
            raise ConfigError("submit.max_requeues", self.max_requeues, "0 or more")
