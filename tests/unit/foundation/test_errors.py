"""Test that typed errors keep their type and text between worker, rank and driver."""

from __future__ import annotations

import inspect
import pickle

import pytest

import activation_store.errors
import analysis.errors
import cluster.errors
import sae_core.errors

MODULES = (activation_store.errors, analysis.errors, cluster.errors, sae_core.errors)
ERRORS = [
    error
    for module in MODULES
    for _, error in inspect.getmembers(module, inspect.isclass)
    if issubclass(error, Exception) and error.__module__ == module.__name__
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_round_trip(error):
    keyed = "key" in inspect.signature(error.__init__).parameters
    raised = error("a.key", 3, "four", "set it") if keyed else error("what went wrong")
    again = pickle.loads(pickle.dumps(raised))
    assert type(again) is error and str(again) == str(raised)
