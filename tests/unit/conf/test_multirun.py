"""Test the names of a sweep's cells."""

from __future__ import annotations

from hydra.conf import HydraConf

from conf.multirun import cell_name, with_constant_keys


def name_of(arguments: list[str], cell: list[str]) -> str:
    """Return the name of `cell` in the sweep that `arguments` ask Hydra for."""
    hydra = HydraConf()
    (added,) = set(with_constant_keys(arguments)) - set(arguments)
    hydra.job.config.override_dirname.exclude_keys = added.partition("=")[2].strip("[]").split(",")
    hydra.overrides.task = cell
    return cell_name("demo", hydra)


def test_a_cell_is_named_after_what_varies():
    typed = ["-m", "sae.k=16,32", "optim.lr=1e-3,2e-3", "train.tokens=200", "store.path=a/b"]
    cell = ["sae.k=16", "optim.lr=1e-3", "train.tokens=200", "store.path=a/b"]
    assert name_of(typed, cell) == "demo-k16-lr0.001"


def test_cell_names_from_choices_paths_and_keys_with_equal_endings():
    assert name_of(["-m", "sae=topk,other"], ["sae=topk"]) == "demo-sae-topk"
    assert name_of(["-m", "store.path=a/b,c"], ["store.path=a/b"]) == "demo-path-a_b"
    typed = ["-m", "train.tokens=1,2", "data.tokens=3,4"]
    cell = ["train.tokens=1", "data.tokens=3"]
    assert name_of(typed, cell) == "demo-train.tokens1-data.tokens3"


def test_a_sweep_over_names_adds_nothing_and_one_run_is_not_a_sweep():
    assert name_of(["-m", "name=demo,other"], ["name=demo"]) == "demo"
    assert with_constant_keys(["sae.k=16"]) == ["sae.k=16"]


def test_flags_stay_before_or_after_all_overrides():
    assert with_constant_keys(["-m", "a=1,2", "b=3"])[:1] == ["-m"]
    assert with_constant_keys(["a=1,2", "b=3", "-m"])[-1] == "-m"
