"""Settings of the Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError


@dataclass
class ClusterConfig:
    """The Ray cluster, and how the stages run on it."""

    mode: str = "sequential"
    """sequential: harvest everything, then train. concurrent: train on the items that have been
    harvested so far."""
    max_lead_items: int | None = None
    """Concurrent mode: number of work items that the harvest may be ahead of the slowest consumer.
    Null: no limit."""
    retention: str = "keep"
    """keep: keep all activations. consumed (concurrent mode only): delete activations once neither
    a consumer nor a kept checkpoint needs them; training then sees every row once."""
    address: str | None = None
    """Address of a Ray cluster to join. Null: start a private cluster on this machine."""
    harvest_workers: int = 2
    """Number of harvest workers. With GPUs, fewer are started if there are not enough GPUs."""
    items_in_flight: int = 2
    """Work items assigned to each harvest worker at a time, including the one that it computes."""
    max_failures: int = 3
    """Number of times that the trainer ranks are restarted after the death of one of them, before
    the run fails."""
    placement_timeout_s: float = 30.0
    """Seconds to wait for Ray to place workers and ranks before the run fails."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a field is invalid; the error names it.
        """
        if self.mode not in ("sequential", "concurrent"):
            raise ConfigError("cluster.mode", self.mode, "sequential or concurrent")
        if self.retention not in ("keep", "consumed"):
            raise ConfigError("cluster.retention", self.retention, "keep or consumed")
        if self.mode == "sequential" and self.retention != "keep":
            raise ConfigError(
                "cluster.retention",
                self.retention,
                "keep with cluster.mode=sequential",
                "set cluster.mode=concurrent to delete consumed activations",
            )
        for name in ("harvest_workers", "items_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name}", getattr(self, name), "at least 1")
        if self.max_failures < 0:
            raise ConfigError("cluster.max_failures", self.max_failures, "0 or more")
        if self.placement_timeout_s <= 0:
            raise ConfigError(
                "cluster.placement_timeout_s", self.placement_timeout_s, "more than 0"
            )
