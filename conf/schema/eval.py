"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import ConfigError


@dataclass
class EvalConfig:
    """Evaluation on held-out text with the SAE spliced into the language model."""

    tokens: int = 32_768
    """Number of held-out tokens to evaluate on, rounded down to whole contexts (at least one)."""
    batch_contexts: int = 8
    """Number of contexts per forward pass of the language model."""
    frequency_tokens: int | None = 1_000_000
    """Number of stored training rows on which firings are counted, drawn at random and rounded up
    to whole blocks of 2,048 rows. If null, or if the store has no more, all rows are counted.
    `dead_fraction` and `eval/frequency.json` rest on this sample; a latent that fires less often
    than about once in this number of tokens counts as dead."""
    sae: str | None = None
    """SAE to evaluate on this run's store and text instead of the run's own: a run, a checkpoint, a
    saved SAE, or a folder of SAELens or sparsify. The run itself must have no checkpoints.
    `sae.hookpoint` names its array in the store, if the SAE names it differently."""
    compute_dtype: str = "auto"
    """Dtype of the encoder's product: float32, bfloat16 (sums in float32), or auto (that of
    `train.compute_dtype`; tf32 counts as float32). Decoding is always in float32."""
    max_memory_gib: float | None = None
    """Memory for the SAE's weights and the rows that it encodes, in GiB, on each device and on the
    host. An SAE that needs more is divided over as many GPUs as training has ranks, or read from
    disk in shards. The language model and a few numbers per latent are not included. If null, half
    of what is free when the stage starts."""

    def validate(self) -> None:
        """Validate all fields.

        Raises:
            ConfigError: If a setting is invalid.
        """
        for name in ("tokens", "batch_contexts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"eval.{name}", getattr(self, name), "at least 1")
        if self.frequency_tokens is not None and self.frequency_tokens < 1:
            raise ConfigError(
                "eval.frequency_tokens", self.frequency_tokens, "at least 1, or null for all rows"
            )
        if self.compute_dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError("eval.compute_dtype", self.compute_dtype, "auto, float32 or bfloat16")
        if self.max_memory_gib is not None and self.max_memory_gib <= 0:
            raise ConfigError(
                "eval.max_memory_gib",
                self.max_memory_gib,
                "more than 0, or null for half of the free memory",
            )
