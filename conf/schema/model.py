"""Settings of the language model."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.hookpoint import check_hookpoints
from foundation.errors import ConfigError


@dataclass
class ModelConfig:
    """The language model whose activations are harvested."""

    path: str = ""
    """A local Hugging Face folder, or a model name on the Hugging Face Hub."""
    revision: str | None = None
    """Revision on the Hub, such as a branch or a commit hash. A commit hash pins the weights. If
    null, the default branch is used."""
    package: str | None = None
    """An installed Python package that contains the model's files; `path` is then relative to the
    package. If null, `path` is a folder or a Hub name."""
    gguf_file: str | None = None
    """Name of a GGUF file in the model's folder. The file is dequantised once, into the cache. If
    null, the model has safetensors weights."""
    kind: str = "causal_lm"
    """causal_lm: a model that predicts the next token. base: a model without its language-model
    head, such as an encoder; it is evaluated without cross-entropy, and its modules have other
    names (`layers.9` instead of `model.layers.9`)."""
    dtype: str = "bfloat16"
    """Number format of the model's weights and activations: bfloat16, float16 or float32."""
    hookpoints: list[str] = field(default_factory=list)
    """Tensors to store: `module` for the output of a module, such as `model.layers.9`, and
    `module@kind` or `module@kind[option=value,...]` for another tensor of the module. On the
    command line, quote hookpoints with options:
    "model.hookpoints=['model.layers.9@kind[option=value]']"."""
    batch_contexts: int = 8
    """Number of contexts in one forward pass."""
    shards: int = 1
    """Number of GPUs, or of processes if there are no GPUs, across which one harvest worker splits
    the model."""
    d_model: int | None = None
    """Width of the model, for `stage=plan` on a machine without the model's files. If null, it is
    read from the files."""
    n_parameters: float | None = None
    """Number of the model's parameters, from which `stage=plan` estimates the harvest time. If
    null, the harvest is not planned."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a field is invalid. The message names the field.
        """
        if not self.path and not self.package:
            raise ConfigError(
                "model.path", self.path, "a local folder or a Hub name", "set model.path"
            )
        if self.kind not in ("causal_lm", "base"):
            raise ConfigError("model.kind", self.kind, "causal_lm or base")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ConfigError("model.dtype", self.dtype, "bfloat16, float16 or float32")
        if not self.hookpoints:
            raise ConfigError(
                "model.hookpoints",
                self.hookpoints,
                "at least one module name, such as model.layers.9",
            )
        check_hookpoints(self.hookpoints)
        for name in ("batch_contexts", "shards"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}", getattr(self, name), "at least 1")
        for name in ("d_model", "n_parameters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.{name}", value, "at least 1, or null")
