"""Errors of the language model and its text."""

from __future__ import annotations

from foundation.errors import FoundryError


class ModelError(FoundryError):
    """The language model or its tokenizer could not be loaded, or a hookpoint was not found."""


class TextError(FoundryError):
    """The text could not be read, or there is too little of it."""
