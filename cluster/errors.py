"""Errors of the stages. Each text gives the value, what was expected, and a remedy."""

from __future__ import annotations


class ClusterError(Exception):
    """Base class of the errors that this package raises on purpose."""


class NonFiniteRowsError(ClusterError):
    """The language model produced NaN or infinite activations, which were not stored."""


class PlacementError(ClusterError):
    """The cluster does not have the resources that workers or ranks need."""


class RankFailedError(ClusterError):
    """Trainer ranks failed more often than `cluster.max_failures` allows."""


class SweepFailedError(ClusterError):
    """Some cells of a sweep failed; the other cells are finished."""


class PreemptedError(ClusterError):
    """Training was preempted after saving a checkpoint; rerun the command to resume."""


class SchedulerError(ClusterError):
    """The scheduler was not found, did not answer, or refused a request."""
