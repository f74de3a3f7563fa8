"""Settings of resharding."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError


@dataclass
class ReshardConfig:
    """Settings for rewriting the newest checkpoint with a different number of files."""

    shards: int = 1
    """Number of files for the weights. The optimiser's moments are written to as many files."""
    to: str | None = None
    """Folder in which to write `step-N/`. If null, `resharded/` in the run folder is used."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a setting is invalid.
        """
        if self.shards < 1:
            raise ConfigError("reshard.shards", self.shards, "at least 1")
