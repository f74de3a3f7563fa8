"""What a user may set about a batch job. No heavy import here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sae_core.errors import ConfigError

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")


@dataclass
class SubmitConfig:
    """The job that `stage=submit` hands to the scheduler; null leaves a choice to the site."""

    scheduler: str = "slurm"
    stage: str = "pipeline"
    """What the job runs."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    """With more than one the job starts Ray across them."""
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
    """Shell lines before the job's command: `module load cuda`."""
    sbatch: list[str] = field(default_factory=list)
    """More options of sbatch: `--exclusive`, `--constraint=h100`."""

    def validate(self, grace_s: float) -> None:
        """Checks the values.

        Args:
            grace_s: seconds that the run takes for its last checkpoint (`checkpoint.grace_s`).

        Raises:
            ConfigError: naming the setting that cannot be.
        """
        if self.scheduler != "slurm":
            raise ConfigError("submit.scheduler", self.scheduler, "slurm")
        for name in ("nodes", "gpus_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"submit.{name}", value, "at least 1")
        if self.max_requeues < 0:
            raise ConfigError("submit.max_requeues", self.max_requeues, "0 or more")
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
        for option in self.sbatch:
            if not option.startswith("-"):
                raise ConfigError("submit.sbatch", option, "options of sbatch, as --exclusive")
        words = (self.partition, self.account, self.qos, self.mem, *self.sbatch)
        for word in words:
            if word is not None and "\n" in word:
                raise ConfigError("submit", word, "options of one line each")


def _seconds(time: str) -> int:
    """Of a time as Slurm reads it: minutes[:seconds], hours:minutes:seconds, or days-hours[...]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    first_unit_s = 3600 if dash or len(parts) == 3 else 60
    units_s = (first_unit_s, first_unit_s // 60, first_unit_s // 3600)
    return int(days or 0) * 86_400 + sum(n * unit for n, unit in zip(parts, units_s, strict=False))
