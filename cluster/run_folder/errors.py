"""Errors of the run folder."""

from __future__ import annotations

from foundation.errors import EXIT_FAILED, FoundryError


class RunDirError(FoundryError):
    """The run folder is in use by another process, or belongs to a run with another config."""


class RunFileError(FoundryError):
    """A file of the run folder exists but cannot be read. The message names the file."""

    exit_code = EXIT_FAILED
