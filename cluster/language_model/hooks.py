"""Capture tensors of a model, or replace one, during a forward pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.language_model.errors import ModelError
from cluster.language_model.hookpoint_kinds import Visit, hidden_states, resolve
from conf.hookpoint import parse_hookpoint

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


class _Captured(Exception):
    """Ends the forward pass once the tensors of all hookpoints are known."""


def capture(model: nn.Module, hookpoints: Sequence[str], input_ids: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the hookpoints from one forward pass.

    The pass stops as soon as all of these tensors are known.

    Args:
        model: A causal language model.
        hookpoints: Hookpoints such as `model.layers.9`, the output of a module, or
            `module@kind[option=value,...]`.
        input_ids: [contexts, context_tokens] int64, on the model's device.

    Returns:
        For each hookpoint a tensor [contexts, context_tokens, D] in the model's dtype.

    Raises:
        ModelError: If a module does not exist, did not run, or has a tensor of another shape.
        ConfigError: If a hookpoint is malformed, or its kind or options do not exist.
    """
    import torch

    tensors: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        # If a module runs more than once, keep the value of its first run.
        tensors.setdefault(name, hidden_states(parse_hookpoint(name), value, input_ids.shape))
        if len(tensors) == len(hookpoints):
            raise _Captured

    handles: list[RemovableHandle] = []
    try:
        for name in hookpoints:
            handles.append(_attach(model, name, partial(keep, name)))
        with torch.inference_mode():
            model(input_ids=input_ids, use_cache=False)
    except _Captured:
        return tensors
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(hookpoints) - set(tensors))
    raise ModelError(
        f"model.hookpoints: the forward pass did not run {missing}; choose modules that it runs"
    )


@contextmanager
def splice(model: nn.Module, hookpoint: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the tensor of `hookpoint` during the block, at every position except the first.

    Position 0, an attention sink, is left unchanged. `replace` takes and returns [contexts,
    context_tokens - 1, D], and its result is cast back to the dtype of the tensor.

    Raises:
        ModelError: If the module does not exist, or (from the forward pass) if the tensor is not
            [contexts, context_tokens, D].
        ConfigError: If the hookpoint is malformed, or its kind or options do not exist.
    """

    def replaced(value: Any) -> Tensor:
        hidden = hidden_states(parse_hookpoint(hookpoint), value)
        spliced = hidden.clone()
        spliced[:, 1:] = replace(hidden[:, 1:]).to(hidden.dtype)
        return spliced

    handle = _attach(model, hookpoint, replaced)
    try:
        yield
    finally:
        handle.remove()


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module with the given name.

    Raises:
        ModelError: If there is no such module. The error lists similar names.
    """
    modules = dict(model.named_modules())
    if name in modules and name:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=5, cutoff=0.5) or list(modules)[1:9]
    raise ModelError(
        f"model.hookpoints: module {name!r} not found in {type(model).__name__}; similar names: "
        f"{', '.join(close)}"
    )


def _attach(model: nn.Module, name: str, visit: Visit) -> RemovableHandle:
    hookpoint, kind = resolve(name)
    return kind.attach(model, find_module(model, hookpoint.module), hookpoint, visit)
