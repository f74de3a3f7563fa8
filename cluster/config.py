"""What a user may set about model, text, logging and cluster. No heavy import here."""

from __future__ import annotations

from dataclasses import dataclass, field

from sae_core.errors import ConfigError


@dataclass
class ModelConfig:
    """The language model whose activations are harvested."""

    path: str = ""
    """A local Hugging Face folder or a hub name."""
    revision: str | None = None
    """Hub revision (a commit hash pins the weights); null takes the default branch."""
    package: str | None = None
    """A Python package that ships the model's files; `path` is then a file or folder inside it."""
    gguf_file: str | None = None
    """A GGUF file in the folder; dequantised once into the cache."""
    dtype: str = "bfloat16"
    """bfloat16, float16 or float32."""
    hookpoints: list[str] = field(default_factory=list)
    """Modules whose output is stored, by their name in the model: `model.layers.9`."""
    batch_contexts: int = 8
    """Contexts per forward pass."""
    shards: int = 1
    """GPUs (on the CPU: processes) of one harvest worker, over which it splits the model."""
    d_model: int | None = None
    """Width, for plans where the model is not on this machine; null: as its files say."""
    n_parameters: float | None = None
    """For the plan of the harvest; null: it is not planned."""

    def validate(self) -> None:
        """Raises: ConfigError: naming the setting that cannot be."""
        if not self.path and not self.package:
            raise ConfigError("model.path", self.path, "a local folder or a hub name")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ConfigError("model.dtype", self.dtype, "bfloat16, float16 or float32")
        if not self.hookpoints:
            raise ConfigError(
                "model.hookpoints", self.hookpoints, "at least one module name, as model.layers.9"
            )
        if len(set(self.hookpoints)) != len(self.hookpoints):
            raise ConfigError("model.hookpoints", self.hookpoints, "each module once")
        for name in ("batch_contexts", "shards"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}", getattr(self, name), "at least 1")
        for name in ("d_model", "n_parameters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.{name}", value, "at least 1, or null")


@dataclass
class DataConfig:
    """The text, and how it becomes contexts of tokens."""

    path: str = ""
    """A text, JSONL, JSON or Parquet file, a folder of them, or a saved Hugging Face dataset."""
    package: str | None = None
    """A Python package that ships the text; `path` is then relative to it."""
    text_field: str = "text"
    """Field (JSONL, JSON, Parquet, dataset) that holds the text."""
    tokens: int = 400_000
    """Rows to store per hookpoint; rounded up to whole contexts; less when the text runs out."""
    context_tokens: int = 128
    """Length of a context, BOS included."""
    heldout_fraction: float = 0.05
    """Share of documents kept for evaluation, out of the store; chosen by a hash of each."""
    drop_special_tokens: bool = True
    """Leave out rows of BOS, EOS and padding. Position 0, an attention sink, always is."""

    def validate(self) -> None:
        """Raises: ConfigError: naming the setting that cannot be."""
        if not self.path:
            raise ConfigError("data.path", self.path, "a file or a folder of text")
        if self.tokens < 1:
            raise ConfigError("data.tokens", self.tokens, "at least 1")
        if self.context_tokens < 2:
            raise ConfigError(
                "data.context_tokens",
                self.context_tokens,
                "at least 2: position 0 is always dropped",
            )
        if not 0 < self.heldout_fraction < 1:
            raise ConfigError(
                "data.heldout_fraction", self.heldout_fraction, "between 0 and 1, both excluded"
            )


@dataclass
class LoggingConfig:
    """Where metrics go besides `metrics.jsonl`."""

    wandb: str = "auto"
    """auto (online when a key is set, else offline), online, offline or disabled."""
    wandb_project: str = "sae"
    every_steps: int = 10
    """Optimiser steps between two metric rows."""

    def validate(self) -> None:
        """Raises: ConfigError: naming the setting that cannot be."""
        if self.wandb not in ("auto", "online", "offline", "disabled"):
            raise ConfigError("logging.wandb", self.wandb, "auto, online, offline or disabled")
        if self.every_steps < 1:
            raise ConfigError("logging.every_steps", self.every_steps, "at least 1")


@dataclass
class ClusterConfig:
    """The Ray cluster: where it is and what runs on it."""

    mode: str = "sequential"
    """sequential: harvest, then train; concurrent: train on what has been harvested so far."""
    max_lead_items: int | None = None
    """Concurrent: items that harvesting may be ahead of the slowest consumer; null: any number."""
    retention: str = "keep"
    """Concurrent: keep all activations, or delete what is consumed, once no consumer and no kept
    checkpoint can need it; then training sees every row once."""
    address: str | None = None
    """Ray address to join; null starts a private local cluster."""
    harvest_workers: int = 2
    items_in_flight: int = 2
    """Work items handed to each worker ahead of time."""
    max_failures: int = 3
    """Times the trainer ranks are started anew after one of them died."""
    placement_timeout_s: float = 30.0
    """A placement that is not met by then is an error."""

    def validate(self) -> None:
        """Raises: ConfigError: naming the setting that cannot be."""
        if self.mode not in ("sequential", "concurrent"):
            raise ConfigError("cluster.mode", self.mode, "sequential or concurrent")
        if self.retention not in ("keep", "consumed"):
            raise ConfigError("cluster.retention", self.retention, "keep or consumed")
        if self.mode == "sequential" and self.retention != "keep":
            raise ConfigError(
                "cluster.retention", self.retention, "keep with cluster.mode=sequential"
            )
        for name in ("harvest_workers", "items_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name}", getattr(self, name), "at least 1")
        if self.max_failures < 0:
            raise ConfigError("cluster.max_failures", self.max_failures, "0 or more")
        if self.placement_timeout_s <= 0:
            raise ConfigError(
                "cluster.placement_timeout_s", self.placement_timeout_s, "more than 0"
            )
