"""Whether a store can be trained on as the config says."""

from __future__ import annotations

from activation_store import Store, check_mixture, open_store, store_exists
from activation_store.creation import shorten
from activation_store.errors import StoreConfigError
from conf.schema import RunConfig
from sae_core.errors import ConfigError


def check_store(config: RunConfig) -> str:
    """The array to train on, once the store is known to serve the config.

    Asked by the driver before it starts ranks, and by every rank, which torchrun starts alone.

    Raises:
        ConfigError, StoreConfigError: naming what does not fit.
    """
    if not store_exists(config.store.path):
        raise StoreConfigError(
            "store.path",
            config.store.path,
            "a store of activations",
            "make one with stage=harvest or activation_store.StoreWriter",
        )
    store = open_store(config.store.path)
    growing = not store.finalised
    if growing and config.cluster.mode != "concurrent":
        raise StoreConfigError(
            "store.path",
            config.store.path,
            "a finalised store",
            "finish it with stage=harvest or StoreWriter.finalise(), or train while it grows with "
            "stage=pipeline cluster.mode=concurrent",
        )
    array = config.sae.hookpoint or next(iter(store.arrays))
    if array not in store.arrays:
        raise ConfigError("sae.hookpoint", array, f"an array of the store: {list(store.arrays)}")
    if not growing and store.n_tokens < config.train.batch_tokens:
        raise ConfigError(
            "train.batch_tokens", config.train.batch_tokens, f"at most {store.n_tokens} stored rows"
        )
    require_finite(store, array)
    if config.store.mixture:
        check_mixture([store, *others(config, array)], config.store.weights, [array])
    return array


def others(config: RunConfig, array: str) -> list[Store]:
    """The stores that are mixed in, each of which can be: finished, with finite rows.

    Raises:
        StoreConfigError, IncompleteStoreError: naming what does not fit.
    """
    found = []
    for path in config.store.paths[1:]:
        if not store_exists(path):
            raise StoreConfigError("store.mixture", path, "a store of activations")
        store = open_store(path)
        check_mixture([store], [1.0], [array])
        require_finite(store, array, "store.mixture")
        found.append(store)
    return found


def require_finite(store: Store, array: str, key: str = "store.path") -> None:
    """That no committed row of an array holds NaN or infinities.

    Args:
        store: whose rows.
        array: of them.
        key: the setting that names the store.

    Raises:
        StoreConfigError: naming the items that do.
    """
    bad = store.non_finite_items(array)
    if bad:
        raise StoreConfigError(
            key,
            str(store.path),
            f"finite activations, {array} holds {sum(bad.values())} numbers that are not, in "
            f"items {shorten(list(bad))}",
            "store it anew without them",
        )
