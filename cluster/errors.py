"""What can go wrong in and between the stages; each says the value, what was expected, a remedy."""

from __future__ import annotations


class ClusterError(Exception):
    """Base of every error this package raises on purpose."""


class ModelError(ClusterError):
    """The language model or its tokenizer cannot be loaded, or has no such hookpoint."""


class TextError(ClusterError):
    """The text cannot be read, or there is too little of it."""


class NonFiniteRowsError(ClusterError):
    """The language model gave activations that are NaN or infinite; they were not stored."""


class RunDirError(ClusterError):
    """The run folder is in use, or belongs to another config."""


class PlacementError(ClusterError):
    """The cluster cannot give the ranks what they ask for."""


class RankFailedError(ClusterError):
    """Trainer ranks died more often than the config allows."""


class SweepFailedError(ClusterError):
    """Some cells of a sweep failed; the others are done."""


class PreemptedError(ClusterError):
    """Somebody asked the trainer ranks to stop; they have saved, and the same command resumes."""


class SchedulerError(ClusterError):
    """The scheduler is not there, does not answer, or refuses what it was asked."""
