"""Errors raised when a run is evaluated, exported, fitted or reported."""

from __future__ import annotations

from foundation.errors import FoundryError


class AnalysisError(FoundryError):
    """Base class of all errors that this package raises."""


class ExportError(AnalysisError, ValueError):
    """The SAE cannot be written in another library's format."""


class FitError(AnalysisError, ValueError):
    """No scaling law can be fitted to a sweep; the message says what is missing."""
