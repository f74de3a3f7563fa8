"""Capture tensors of a model, or replace one, during a forward pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.language_model.errors import ModelError
from cluster.language_model.hookpoint_kinds import Visit, hidden_states, resolve
from cluster.language_model.sizes import n_embeddings
from conf.hookpoint import parse_hookpoint

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


_ROUNDING = 0.1
"""Largest difference between passes, relative to a row's norm, that is attributed to rounding."""


class _Captured(Exception):
    """Ends the forward pass once the tensors of all hookpoints are known."""


def capture(
    model: nn.Module, hookpoints: Sequence[str], input_ids: Tensor, **arguments: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of the hookpoints from one forward pass.

    The pass stops as soon as all of these tensors are known.

    Args:
        model: A causal language model.
        hookpoints: Hookpoints such as `model.layers.9`, the output of a module, or
            `module@kind[option=value,...]`.
        input_ids: [contexts, context_tokens] int64, on the model's device.
        arguments: Further arguments of the forward pass.

    Returns:
        For each hookpoint a tensor [contexts, context_tokens, D] in the model's dtype.

    Raises:
        ModelError: If a module does not exist, did not run, or has a tensor of another shape.
        ConfigError: If a hookpoint is malformed, or its kind or options do not exist.
    """
    import torch

    tensors: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        tensors[name] = hidden_states(parse_hookpoint(name), value, input_ids.shape)
        if len(tensors) == len(hookpoints):
            raise _Captured

    handles: list[RemovableHandle] = []
    try:
        for name in hookpoints:
            handles.append(register(model, name, partial(keep, name)))
        with torch.inference_mode():
            model(input_ids=input_ids, use_cache=False, **arguments)
    except _Captured:
        return tensors
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(hookpoints) - set(tensors))
    raise ModelError(
        f"model.hookpoints: the forward pass did not run {missing}; choose modules that it runs"
    )


def require_one_row_per_token(model: nn.Module, hookpoints: Sequence[str]) -> None:
    """Check that a forward pass runs the module of every hookpoint once, in the order of tokens.

    `capture` would take the first of several calls, and `splice` would replace them all. Tensors
    [contexts * context_tokens, W], as inside mixtures of experts, may be in another order, which is
    detected by swapping two contexts. Runs complete forward passes over a few tokens. If the model
    is split, all of its ranks must call this.

    Raises:
        ModelError: If a module runs several times, as with layers that share their weights, or its
            rows are not in the order of tokens.
        ConfigError: If a hookpoint is malformed, or its kind or options do not exist.
    """
    import torch

    calls = dict.fromkeys(hookpoints, 0)
    flat: set[str] = set()

    def count(name: str, value: Any) -> None:
        calls[name] += 1
        if isinstance(value, torch.Tensor) and value.ndim == 2:
            flat.add(name)

    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    handles = [register(model, name, partial(count, name)) for name in hookpoints]
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    except (ValueError, TypeError):
        # The decoder of an encoder-decoder model lacks its input. Its hookpoints cannot be captured
        # either, and those of the encoder have run by now.
        pass
    finally:
        for handle in handles:
            handle.remove()
    repeated = {name: times for name, times in calls.items() if times > 1}
    if repeated:
        raise ModelError(
            "model.hookpoints: expected modules that run once in a forward pass; these run several "
            f"times: {', '.join(f'{name} ({times} times)' for name, times in repeated.items())}; "
            "choose modules inside or around the repeated part"
        )
    if flat:
        _require_token_order(model, sorted(flat))


def _require_token_order(model: nn.Module, hookpoints: Sequence[str]) -> None:
    """Check that swapping two contexts swaps their rows.

    Raises:
        ModelError: If this is not the case.
    """
    import torch

    n_tokens = 8
    ids = torch.arange(2 * n_tokens, device=next(model.parameters()).device).view(2, n_tokens)
    ids = ids % n_embeddings(model)
    rows, swapped = capture(model, hookpoints, ids), capture(model, hookpoints, ids.flip(0))
    for name in hookpoints:
        if not rows_agree(rows[name], swapped[name].flip(0)):
            raise ModelError(
                f"model.hookpoints: the rows of {name!r} are not in the order of the tokens; "
                "choose a module around it, whose output is [contexts, context_tokens, width]"
            )


def rows_agree(x: Tensor, y: Tensor) -> bool:
    """Return True if rows of two forward passes differ by no more than rounding.

    Position 0 is left out, because attention sinks have far larger norms and hide the other rows.

    Args:
        x: [contexts, tokens, D] rows of one pass.
        y: The same rows of another pass.
    """
    difference = (x - y)[:, 1:].float().norm(dim=-1)
    size = x[:, 1:].float().norm(dim=-1)
    return bool((difference <= _ROUNDING * size.clamp_min(0.01 * size.median())).all())


class RunningPass:
    """Shape, padding and cached tokens of the forward pass that is running.

    Register `note` as a hook before the forward pass of the model, with keyword arguments.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None
        """Number of texts and of their tokens in this pass, B and T; None if it is not known."""
        self._mask: Tensor | None = None
        self._cached = 0

    def note(self, _model: nn.Module, given: Sequence[Any], named: dict[str, Any]) -> None:
        """Record the arguments of a forward pass."""
        tokens = named.get("input_ids", given[0] if given else None)
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        self.shape = None if tokens is None else tuple(tokens.shape[:2])
        self._mask = named.get("attention_mask", given[1] if len(given) > 1 else None)
        cache = named.get("past_key_values")
        self._cached = int(cache.get_seq_length()) if cache is not None else 0

    def inside_texts(self, x: Tensor) -> Tensor:
        """Return a mask [B, T] of the tokens that are neither padding nor the first of a text.

        Args:
            x: [B, T, D] activations of this pass.
        """
        import torch

        n_texts, n_tokens = x.shape[:2]
        end = self._cached + n_tokens
        positions = torch.arange(self._cached, end, device=x.device)
        if self._mask is None or self._mask.ndim != 2 or self._mask.shape[1] < end:
            return (positions > 0).expand(n_texts, n_tokens)
        real = self._mask.to(x.device).bool()
        first = real.int().argmax(1, keepdim=True)
        return real[:, self._cached : end] & (positions > first)


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

    def replaced(hidden: Tensor, _running: RunningPass) -> Tensor:
        spliced = hidden.clone()
        spliced[:, 1:] = replace(hidden[:, 1:]).to(hidden.dtype)
        return spliced

    with replaced_by(model, hookpoint, replaced):
        yield


@contextmanager
def replaced_by(
    model: nn.Module, hookpoint: str, replace: Callable[[Tensor, RunningPass], Tensor]
) -> Iterator[None]:
    """Replace the tensor of `hookpoint`, [B, T, D], during the block by what `replace` returns.

    Raises:
        ModelError: If the module does not exist, or (from the forward pass) if the tensor has
            another shape.
        ConfigError: If the hookpoint is malformed, or its kind or options do not exist.
    """
    running = RunningPass()

    def visit(value: Any) -> Tensor:
        hidden = hidden_states(parse_hookpoint(hookpoint), value, running.shape)
        replaced: Tensor = replace(hidden, running).reshape(value.shape)
        return replaced

    handles = [model.register_forward_pre_hook(running.note, with_kwargs=True)]
    try:
        handles.append(register(model, hookpoint, visit))
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module with the given name.

    Raises:
        ModelError: If there is no such module. The error lists modules with similar names, if any.
    """
    modules = dict(model.named_modules())
    if name in modules and name:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=5, cutoff=0.5) or list(modules)[1:9]
    raise ModelError(
        f"model.hookpoints: module {name!r} not found in {type(model).__name__}; use one of its "
        f"modules, such as {', '.join(close)}"
    )


def register(model: nn.Module, name: str, visit: Visit) -> RemovableHandle:
    """Register a hook that calls `visit` with a hookpoint's value in every forward pass.

    Raises:
        ModelError: If the module does not exist.
        ConfigError: If the hookpoint is malformed, or its kind or options do not exist.
    """
    hookpoint, kind = resolve(name)
    return kind.attach(model, find_module(model, hookpoint.module), hookpoint, visit)
