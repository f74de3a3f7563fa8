"""Kinds of hookpoints: which tensor of a module is captured or replaced.

A hookpoint is written `module`, `module@kind` or `module@kind[option=value,...]`. Without a kind,
it refers to the module's output. To add a kind, subclass `HookpointKind` and register an instance
in `HOOKPOINT_KINDS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from cluster.language_model.errors import ModelError
from conf.hookpoint import Hookpoint, parse_hookpoint
from conf.schema.model import ModelConfig
from foundation.errors import ConfigError
from foundation.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

Visit = Callable[[Any], "Tensor | None"]
"""Function that is called with a hookpoint's value in each forward pass. It returns the tensor to
continue with, or None to leave the value unchanged."""


class HookpointKind(ABC):
    """One way to take a tensor [contexts, context_tokens, D] from a module, and to replace it."""

    works_with_shards: bool = False
    """True if the kind may be used with a model that is split over processes. Every rank must then
    hold the complete tensor, which the first forward pass checks."""

    @abstractmethod
    def attach(
        self, model: nn.Module, module: nn.Module, hookpoint: Hookpoint, visit: Visit
    ) -> RemovableHandle:
        """Register a hook that calls `visit` whenever the module runs.

        Args:
            model: The language model, whose `config` has its sizes.
            module: The module of `model` that `hookpoint` names.
            hookpoint: The hookpoint, for its options.
            visit: Function that the hook must call with the hookpoint's value before the model uses
                it any further. If it returns a tensor, the model must continue with that tensor. It
                checks the value with `hidden_states`, and may raise to end the forward pass.

        Returns:
            Handle that removes the hook.
        """

    def check(self, hookpoint: Hookpoint) -> None:
        """Check the hookpoint's options. By default, a kind has no options.

        Raises:
            ConfigError: If an option is unknown, missing or has an invalid value.
        """
        if hookpoint.options:
            raise ConfigError(
                "model.hookpoints",
                str(hookpoint),
                f"no options in brackets, because the kind {hookpoint.kind!r} has none",
            )

    def width(self, hookpoint: Hookpoint, config: Any) -> int:
        """Return the expected width D, for planning. The default is the residual stream's width.

        Args:
            hookpoint: The hookpoint.
            config: The model's transformers configuration.

        Raises:
            AttributeError: If the configuration lacks the size.
        """
        return int(config.hidden_size)


HOOKPOINT_KINDS: Registry[HookpointKind] = Registry(
    kind="hookpoint kind",
    key="model.hookpoints",
    group="hookpoint_kinds",
    builtin={
        "output": "cluster.language_model.module_tensors:OUTPUT",
        "input": "cluster.language_model.module_tensors:INPUT",
    },
)


def resolve(text: str) -> tuple[Hookpoint, HookpointKind]:
    """Parse a hookpoint and look up its kind.

    Raises:
        ConfigError: If the string is malformed, or its kind or options do not exist.
    """
    hookpoint = parse_hookpoint(text)
    if hookpoint.kind not in HOOKPOINT_KINDS:
        kinds = ", ".join(HOOKPOINT_KINDS.names())
        raise ConfigError("model.hookpoints", text, f"one of these kinds after '@': {kinds}")
    kind = HOOKPOINT_KINDS[hookpoint.kind]
    kind.check(hookpoint)
    return hookpoint, kind


def hidden_states(
    hookpoint: Hookpoint, value: Any, expected: tuple[int, ...] | None = None
) -> Tensor:
    """Check that a value is a tensor [contexts, context_tokens, width], and return it.

    A tensor [contexts * context_tokens, width] is returned in that shape.

    Args:
        hookpoint: Where the value was found, used in the error message.
        value: What the hook took from the module.
        expected: Expected [contexts, context_tokens]. If None, any shape with three dimensions is
            accepted.

    Raises:
        ModelError: If the value is not such a tensor.
    """
    import torch

    is_tensor = isinstance(value, torch.Tensor)
    if is_tensor and value.ndim == 2 and expected and len(value) == math.prod(expected):
        value = value.view(*expected, -1)
    if not is_tensor or value.ndim != 3 or value.shape[:2] != (expected or value.shape[:2]):
        raise ModelError(
            f"model.hookpoints: the {hookpoint.describe()} is "
            f"{list(value.shape) if is_tensor else type(value).__name__}; expected a tensor "
            "[contexts, context_tokens, width]; choose another module"
        )
    return cast("Tensor", value)


def require_usable(cfg: ModelConfig) -> None:
    """Check that every hookpoint's kind exists and works with `cfg.shards`. Called before any work.

    Raises:
        ConfigError: If a hookpoint is malformed, its kind or options do not exist, or its kind does
            not work with a model that is split over processes.
    """
    for text in cfg.hookpoints:
        hookpoint, kind = resolve(text)
        if cfg.shards > 1 and not kind.works_with_shards:
            raise ConfigError(
                "model.shards",
                cfg.shards,
                f"1, because hookpoints of the kind {hookpoint.kind!r} ({text}) need a whole model",
                "raise cluster.harvest_workers to run more whole copies of the model",
            )
