"""What a figure was measured on: hardware, versions, commit and command, as runs record it."""

from __future__ import annotations

from cluster.environment import ROOT, environment, threads

__all__ = ["ROOT", "environment", "threads"]
