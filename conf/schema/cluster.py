"""Settings of the Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError


@dataclass
class ClusterConfig:
    """The Ray cluster, and how the stages run on it."""

    mode: str = "sequential"
    """sequential: harvest everything, then train. concurrent: harvest and train at once, using the
    items that have been harvested so far."""
    max_lead_items: int | None = None
    """Maximum number of work items by which the harvest may be ahead of the slowest consumer in
    concurrent mode. If null, there is no limit."""
    retention: str = "keep"
    """keep: keep all activations. consumed (concurrent mode only): delete activations once neither
    a consumer nor a kept checkpoint needs them, so that training sees every row at most once."""
    address: str | None = None
    """Address of a Ray cluster to join. If null, a private cluster is started on this machine."""
    harvest_workers: int = 2
    """Number of harvest workers. On GPUs, fewer are started if there are not enough GPUs."""
    items_in_flight: int = 2
    """Number of work items assigned to a harvest worker at once, including the one it is
    computing."""
    max_failures: int = 3
    """Number of times that all trainer ranks are restarted after one of them has died. At the next
    death, the run fails."""
    placement_timeout_s: float = 30.0
    """Seconds to wait for Ray to place workers and ranks before the run fails."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a field is invalid. The message names the field.
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
