"""Errors of the run folder."""

from __future__ import annotations

from analysis.errors import AnalysisError
from cluster.errors import ClusterError


class RunDirError(ClusterError):
    """The run folder is in use by another process, or belongs to a run with another config."""


class RunFileError(AnalysisError):
    """A file of the run folder exists but cannot be read; the message names it."""
