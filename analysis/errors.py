"""What can go wrong when a run is evaluated, exported or reported."""

from __future__ import annotations


class AnalysisError(Exception):
    """Base of every error this package raises on purpose."""


class ExportError(AnalysisError, ValueError):
    """Something about the SAE that another library's folder cannot hold."""


class RunFileError(AnalysisError):
    """A file of the run folder that is there but cannot be read: names it."""


class FitError(AnalysisError, ValueError):
    """A sweep whose cells allow no scaling law: says what they lack."""
