"""Errors of the stages. Each message gives the value found, the value expected, and a fix."""

from __future__ import annotations

from foundation.errors import EXIT_FAILED, EXIT_PREEMPTED, FoundryError


class ClusterError(FoundryError):
    """Base class of the errors that this package raises on purpose."""


class NonFiniteRowsError(ClusterError):
    """The language model produced NaN or infinite activations, which were not stored."""


class PlacementError(ClusterError):
    """The cluster does not have the resources that workers or ranks need."""


class RankFailedError(ClusterError):
    """Trainer ranks failed more often than `cluster.max_failures` allows."""

    exit_code = EXIT_FAILED


class SweepFailedError(ClusterError):
    """Some cells of a sweep failed; the other cells are finished."""

    exit_code = EXIT_FAILED


class PreemptedError(ClusterError):
    """Training was preempted after saving a checkpoint; rerun the command to resume."""

    exit_code = EXIT_PREEMPTED


class SchedulerError(ClusterError):
    """The scheduler was not found, did not respond, or refused a request."""

    exit_code = EXIT_FAILED
