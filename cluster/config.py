"""Settings of the model, the text, logging and the cluster.

Every command imports this file, so it must not import anything slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sae_core.errors import ConfigError


@dataclass
class ModelConfig:
    """The language model whose activations are harvested."""

    path: str = ""
    """A local Hugging Face folder, or a model name on the Hugging Face Hub."""
    revision: str | None = None
    """Revision on the Hub, such as a branch or a commit hash. A hash pins the weights. Null: the
    default branch."""
    package: str | None = None
    """An installed Python package that contains the model's files; `path` is then relative to the
    package. Null: `path` is a folder or a Hub name."""
    gguf_file: str | None = None
    """Name of a GGUF file in the model's folder. It is dequantised once into the cache. Null: the
    model has safetensors weights."""
    dtype: str = "bfloat16"
    """Number format of the model's weights and activations: bfloat16, float16 or float32."""
    hookpoints: list[str] = field(default_factory=list)
    """Names of the modules whose outputs are stored, such as `model.layers.9`."""
    batch_contexts: int = 8
    """Number of contexts in one forward pass."""
    shards: int = 1
    """Number of GPUs (without GPUs: processes) that one harvest worker splits the model over."""
    d_model: int | None = None
    """Width of the model, for `stage=plan` on a machine without the model's files. Null: read it
    from the files."""
    n_parameters: float | None = None
    """Number of the model's parameters, from which `stage=plan` estimates the harvest. Null: the
    harvest is not planned."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a field is invalid; the error names it.
        """
        if not self.path and not self.package:
            raise ConfigError(
                "model.path", self.path, "a local folder or a Hub name", "set model.path"
            )
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ConfigError("model.dtype", self.dtype, "bfloat16, float16 or float32")
        if not self.hookpoints:
            raise ConfigError(
                "model.hookpoints",
                self.hookpoints,
                "at least one module name, such as model.layers.9",
            )
        if len(set(self.hookpoints)) != len(self.hookpoints):
            raise ConfigError(
                "model.hookpoints",
                self.hookpoints,
                "each module only once",
                "remove the duplicates",
            )
        for name in ("batch_contexts", "shards"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}", getattr(self, name), "at least 1")
        for name in ("d_model", "n_parameters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.{name}", value, "at least 1, or null")


@dataclass
class DataConfig:
    """The text, and how it is split into contexts of tokens."""

    path: str = ""
    """A text, JSONL, JSON or Parquet file, a folder of such files, or a saved Hugging Face
    dataset."""
    package: str | None = None
    """An installed Python package that contains the text; `path` is then relative to the package.
    Null: `path` is a path on this machine."""
    text_field: str = "text"
    """Field or column with the text, in JSONL, JSON and Parquet files and in datasets."""
    tokens: int = 400_000
    """Rows to store per hookpoint. Rounded up to whole contexts; if the text is shorter, all of it
    is stored."""
    context_tokens: int = 128
    """Tokens in a context, BOS included."""
    heldout_fraction: float = 0.05
    """Fraction of the documents that is held out of the store for evaluation. A hash of its text
    decides for each document."""
    drop_special_tokens: bool = True
    """Do not store the rows of BOS, EOS and padding tokens. Position 0 of a context, an attention
    sink, is never stored."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a field is invalid; the error names it.
        """
        if not self.path:
            raise ConfigError("data.path", self.path, "a file or a folder of text", "set data.path")
        if self.tokens < 1:
            raise ConfigError("data.tokens", self.tokens, "at least 1")
        if self.context_tokens < 2:
            raise ConfigError(
                "data.context_tokens",
                self.context_tokens,
                "at least 2, as position 0 is never stored",
            )
        if not 0 < self.heldout_fraction < 1:
            raise ConfigError(
                "data.heldout_fraction",
                self.heldout_fraction,
                "a fraction between 0 and 1, exclusive",
            )


@dataclass
class LoggingConfig:
    """How often metrics are written, and where to besides `metrics.jsonl`."""

    wandb: str = "auto"
    """Mode of Weights & Biases: auto (online if an API key is set, otherwise offline), online,
    offline or disabled."""
    wandb_project: str = "sae"
    """Project on Weights & Biases."""
    every_steps: int = 10
    """Optimiser steps between two rows of metrics."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a field is invalid; the error names it.
        """
        if self.wandb not in ("auto", "online", "offline", "disabled"):
            raise ConfigError("logging.wandb", self.wandb, "auto, online, offline or disabled")
        if self.every_steps < 1:
            raise ConfigError("logging.every_steps", self.every_steps, "at least 1")


@dataclass
class ClusterConfig:
    """The Ray cluster, and how the stages run on it."""

    mode: str = "sequential"
    """sequential: harvest everything, then train. concurrent: train on the items that have been
    harvested so far."""
    max_lead_items: int | None = None
    """Concurrent mode: number of work items that the harvest may be ahead of the slowest consumer.
    Null: no limit."""
    retention: str = "keep"
    """keep: keep all activations. consumed (concurrent mode only): delete activations once neither
    a consumer nor a kept checkpoint needs them; training then sees every row once."""
    address: str | None = None
    """Address of a Ray cluster to join. Null: start a private cluster on this machine."""
    harvest_workers: int = 2
    """Number of harvest workers. With GPUs, fewer are started if the GPUs do not
    suffice."""
    items_in_flight: int = 2
    """Work items assigned to each harvest worker at a time, including the one that it computes."""
    max_failures: int = 3
    """How often the trainer ranks are restarted after one of them has died, before the run
    fails."""
    placement_timeout_s: float = 30.0
    """Seconds to wait for Ray to place workers and ranks before it is an error."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a field is invalid; the error names it.
        """
        if self.mode not in ("sequential", "concurrent"):
            raise ConfigError("cluster.mode", self.mode, "sequential or concurrent")
        if self.retention not in ("keep", "consumed"):
            raise ConfigError("cluster.retention", self.retention, "keep or consumed")
        if self.mode == "sequential" and self.retention != "keep":
            raise ConfigError(
                "cluster.retention",
                self.retention,
                "keep, as cluster.mode=sequential",
                "set cluster.mode=concurrent to delete consumed activations",
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
