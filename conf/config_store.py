"""The typed schemas that Hydra composes the config from, stored under their names."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_store import ConfigStore

from conf.schema.run import RunConfig
from sae_core.architectures.registry import ARCHITECTURES
from sae_core.architectures.settings import SAEConfig

_SAE_OPTIONS = Path(__file__).parent / "sae"


def store_schemas() -> None:
    """Store the run's schema and, for each registered architecture, a schema of its settings.

    A YAML file such as conf/sae/topk.yaml names its schema, `sae/<name>_schema`, in its defaults
    list. For an architecture without such a file, the schema itself becomes the option
    `sae=<name>`.
    """
    store = ConfigStore.instance()
    # The chosen option of the group `sae` replaces these settings, so include only the keys that
    # all architectures share.
    store.store(name="run_schema", node=RunConfig(sae=SAEConfig()))
    for name, architecture in ARCHITECTURES.items():
        node = architecture.settings(architecture=name)
        store.store(group="sae", name=f"{name}_schema", node=node)
        if not (_SAE_OPTIONS / f"{name}.yaml").is_file():
            store.store(group="sae", name=name, node=node)
