"""Settings of the scaling-law fit."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError


@dataclass
class FitConfig:
    """Scaling laws fitted to the runs of a sweep."""

    runs: str | None = None
    """Runs to fit, as a folder that contains run folders or as a glob pattern that matches run
    folders (quote the `*`). Required by stage=fit."""
    metric: str = "fvu"
    """Metric to fit: fvu or loss (mean over the last 5% of the training log), or heldout_fvu (the
    FVU on held-out text, measured by stage=evaluate)."""
    hold_out: str = "largest"
    """How to check the laws. largest: fit them again without the runs of the largest dictionary,
    and forecast the metric of these runs. none: no check."""
    bootstrap: int = 1000
    """Number of bootstrap replicates per confidence interval; at least 100."""

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
