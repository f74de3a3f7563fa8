"""Checks that a config can be used to train on a store."""

from __future__ import annotations

from rich.console import Console

from activation_store import Store, check_mixture, open_store, shuffle_quality, store_exists
from activation_store.writing.create import shorten
from conf.hookpoint import find_hookpoint
from conf.schema.run import RunConfig
from foundation.errors import ConfigError

_DIAGNOSED_TOKENS = 20_000_000
"""The shuffle of stores with more tokens is not checked before training: it takes too long.

`python -m activation_store.maintenance.shuffle_quality` checks it on request.
"""


def check_store(config: RunConfig) -> str:
    """Check that the store fits the config and return the name of the array to train on.

    The driver calls this before it starts ranks. Every rank calls it too, because torchrun starts
    ranks without a driver.

    Raises:
        ConfigError: If a setting does not fit the store, or the store is missing, unfinished or has
            non-finite rows.
    """
    if not store_exists(config.store.path):
        raise ConfigError(
            "store.path",
            config.store.path,
            "a store of activations",
            "create one with stage=harvest or activation_store.StoreWriter",
        )
    store = open_store(config.store.path)
    growing = not store.finalised
    if growing and config.cluster.mode != "concurrent":
        raise ConfigError(
            "store.path",
            config.store.path,
            "a finalised store",
            "finish it with stage=harvest or StoreWriter.finalise(), or use stage=pipeline "
            "cluster.mode=concurrent to train while it grows",
        )
    array = trained_array(config, store)
    if not growing and store.n_tokens < config.train.batch_tokens:
        raise ConfigError(
            "train.batch_tokens",
            config.train.batch_tokens,
            f"at most {store.n_tokens}, the number of rows in the store",
        )
    require_finite(store, array)
    if config.store.mixture:
        check_mixture([store, *mixed_in_stores(config, array)], config.store.weights, [array])
    return array


def trained_array(config: RunConfig, store: Store) -> str:
    """Return the name of the array that the SAE is trained on.

    Raises:
        ConfigError: If the store has no array of that name, or several and `sae.hookpoint` is null.
    """
    wanted, arrays = config.sae.hookpoint, list(store.arrays)
    if wanted is None:
        if len(arrays) == 1:
            return arrays[0]
        raise ConfigError(
            "sae.hookpoint", None, f"one of the arrays of {config.store.path}: {arrays}"
        )
    array = find_hookpoint(wanted, arrays)
    if array is None:
        raise ConfigError("sae.hookpoint", wanted, f"an array of the store: {arrays}")
    return array


def mixed_in_stores(config: RunConfig, array: str) -> list[Store]:
    """Open the stores of `store.mixture`, and check that they are finished and have finite rows.

    Raises:
        ConfigError: If a store is missing, does not fit or has non-finite rows.
        IncompleteStoreError: If a store is not finalised.
    """
    found = []
    for path in config.store.paths[1:]:
        if not store_exists(path):
            raise ConfigError("store.mixture", path, "a store of activations")
        store = open_store(path)
        check_mixture([store], [1.0], [array])
        require_finite(store, array, "store.mixture")
        found.append(store)
    return found


def require_finite(store: Store, array: str, key: str = "store.path") -> None:
    """Check that no committed row of an array holds NaN or infinities.

    Args:
        store: The store to check.
        array: Name of the array.
        key: Setting that gives the store's path, used in the error message.

    Raises:
        ConfigError: If any row does. The error names the items.
    """
    bad = store.non_finite_items(array)
    if bad:
        raise ConfigError(
            key,
            str(store.path),
            f"finite activations, but {array} holds {sum(bad.values())} non-finite numbers in "
            f"items {shorten(list(bad))}",
            "write the store again without them",
        )


def warn_about_rows(config: RunConfig, console: Console) -> None:
    """Print warnings about the order of a store's rows, their variance, and mixed documents.

    Stores that are growing or too large to check quickly are skipped.
    """
    from cluster.training.spread_sample import (  # imports torch
        concentration_warning,
        order_warning,
    )

    paths = config.store.paths
    for path in paths:
        store = open_store(path)
        if not store.finalised or store.n_tokens > _DIAGNOSED_TOKENS:
            continue
        for diagnosis in (order_warning, concentration_warning):
            warning = diagnosis(store, trained_array(config, store), config.train.sample_tokens)
            if warning:
                console.print(f"train: {warning}", soft_wrap=True)
        quality = shuffle_quality(
            store,
            config.order_seed,
            config.store.window_items,
            max(1, config.store.buffer_tokens // len(paths)),
            config.train.batch_tokens,
            max_batches=20,
        )
        if quality.warning:
            which = f"{path}: " if len(paths) > 1 else ""
            console.print(f"train: {which}{quality.warning}", soft_wrap=True)
