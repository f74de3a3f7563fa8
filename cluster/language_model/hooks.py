"""Capture a module's output, or replace it, during a forward pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from cluster.language_model.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class _Captured(Exception):
    """Ends the forward pass once the outputs of all hookpoints are known."""


def capture(model: nn.Module, hookpoints: Sequence[str], input_ids: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the named modules from one forward pass.

    The pass stops as soon as the last of these modules has run.

    Args:
        model: A causal language model.
        hookpoints: Module names such as `model.layers.9`.
        input_ids: [contexts, context_tokens] int64, on the model's device.

    Returns:
        For each hookpoint a tensor [contexts, context_tokens, D] in the model's dtype.

    Raises:
        ModelError: If a module does not exist, did not run, or has an output of another shape.
    """
    import torch

    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        # If a module runs more than once, its first output counts.
        outputs.setdefault(name, _hidden(name, output, input_ids.shape))
        if len(outputs) == len(hookpoints):
            raise _Captured

    modules = [find_module(model, name) for name in hookpoints]
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name, module in zip(hookpoints, modules, strict=True)
    ]
    try:
        with torch.inference_mode():
            model(input_ids=input_ids, use_cache=False)
    except _Captured:
        return outputs
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(hookpoints) - set(outputs))
    raise ModelError(
        f"model.hookpoints: the forward pass did not run {missing}; choose modules that it runs"
    )


@contextmanager
def splice(model: nn.Module, hookpoint: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of `hookpoint` at every position but the first during the block.

    Position 0, an attention sink, is left as it is. `replace` takes and returns
    [contexts, context_tokens - 1, D]; its result is cast back to the dtype of the module's output.

    Raises:
        ModelError: If the module does not exist, or (from the forward pass) if its output is not
            [contexts, context_tokens, D].
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = _hidden(hookpoint, output)
        spliced = hidden.clone()
        spliced[:, 1:] = replace(hidden[:, 1:]).to(hidden.dtype)
        return (spliced, *output[1:]) if isinstance(output, tuple) else spliced

    handle = find_module(model, hookpoint).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module with the given name.

    Raises:
        ModelError: If there is none; the error lists similar names.
    """
    modules = dict(model.named_modules())
    if name in modules and name:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=5, cutoff=0.5) or list(modules)[1:9]
    raise ModelError(
        f"model.hookpoints: module {name!r} not found in {type(model).__name__}; similar names: "
        f"{', '.join(close)}"
    )


def _hidden(name: str, output: Any, expected: torch.Size | None = None) -> Tensor:
    """Return the hidden states in a module's output, which may be a tuple that begins with them.

    `expected` is the shape [contexts, context_tokens] that the output must begin with.
    """
    import torch

    hidden = output[0] if isinstance(output, tuple) else output
    is_tensor = isinstance(hidden, torch.Tensor)
    if not is_tensor or hidden.ndim != 3 or hidden.shape[:2] != (expected or hidden.shape[:2]):
        raise ModelError(
            f"model.hookpoints: the output of {name!r} is "
            f"{list(hidden.shape) if is_tensor else type(hidden).__name__}; expected a tensor "
            "[contexts, context_tokens, width]; choose another module"
        )
    return cast("Tensor", hidden)
