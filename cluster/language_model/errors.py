"""Errors of the language model and its text."""

from __future__ import annotations

from cluster.errors import ClusterError


class ModelError(ClusterError):
    """The language model or its tokenizer could not be loaded, or a hookpoint was not found."""


class TextError(ClusterError):
    """The text could not be read, or there is too little of it."""
