"""Settings of the scaling-law fit."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError


@dataclass
class FitConfig:
    """Scaling laws fitted to the runs of a sweep."""

    runs: str | None = None
    """Runs to fit: a folder of run folders, or a glob pattern of run folders (quote its `*`).
    Required by stage=fit."""
    metric: str = "fvu"
    """Metric to fit: fvu or loss (mean over the last 5% of the training log), or heldout_fvu (the
    FVU on held-out text, measured by stage=evaluate)."""
    hold_out: str = "largest"
    """Check of the laws. largest: fit them again without the cells of the largest n and forecast
    those cells; none: no check."""
    bootstrap: int = 1000
    """Bootstrap replicates behind each interval; at least 100."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a setting is invalid.
        """
        metrics = ("fvu", "loss", "heldout_fvu")
        if self.metric not in metrics:
            raise ConfigError("fit.metric", self.metric, f"one of {', '.join(metrics)}")
        if self.hold_out not in ("largest", "none"):
            raise ConfigError("fit.hold_out", self.hold_out, "largest or none")
        if self.bootstrap < 100:
            raise ConfigError("fit.bootstrap", self.bootstrap, "at least 100 for 95% intervals")
