"""The torch operators that make the host wait for a CUDA device, or sum in no fixed order there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

_aten = torch.ops.aten

COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten._copy_from.default}
INDEX_PUTS = {_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
INDEXINGS = {_aten.index.Tensor, *INDEX_PUTS}
INDEX_DTYPES = {torch.int64, torch.int32, torch.bool, torch.uint8}
MASK_DTYPES = {torch.bool, torch.uint8}
UNORDERED = {
    _aten.cumsum.default,
    _aten.embedding_dense_backward.default,
    _aten.index_add.default,
    _aten.index_add_.default,
    _aten.index_reduce.default,
    _aten.index_reduce_.default,
    _aten.put_.default,
    _aten.scatter_add.default,
    _aten.scatter_add_.default,
    _aten.scatter_reduce.two,
    _aten.scatter_reduce_.two,
}
"""Operators whose sums of floats depend on timing, by the documentation of
`torch.use_deterministic_algorithms`."""
_UNKNOWN_LENGTH = {
    "bincount": _aten.bincount.default,
    "masked_select": _aten.masked_select.default,
    "nonzero": _aten.nonzero.default,
    "repeat_interleave": _aten.repeat_interleave.Tensor,
    "unique": _aten._unique2.default,
    "unique_consecutive": _aten.unique_consecutive.default,
    "unique_dim": _aten.unique_dim.default,
}
"""Operators that wait because the length of their result depends on numbers."""
_WAITING = {
    "check for errors": _aten._linalg_check_errors.default,
    "equal": _aten.equal.default,
    "item": _aten._local_scalar_dense.default,
    **_UNKNOWN_LENGTH,
}

Answer = Callable[[int], int]
"""Gives the device's answer, or the argument if there is none; see `FakeDevice.answers`."""


def waits_for(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Return what an operator waits for, or None if it does not wait.

    Copies between the host and the device are not considered.
    """
    if func in INDEXINGS and _masks(args[1]):
        if func is _aten.index.Tensor:
            return "index by a mask"
        # torch runs `x[mask] = number` as masked_fill.
        filled = args[2].numel() == 1 and not (len(args) > 3 and args[3])
        return None if filled else "assignment by a mask"
    if kwargs.get("output_size") is not None:
        return None
    return next((name for name, one in _WAITING.items() if one is func), None)


def has_unknown_result(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return True if only numbers determine an operator's result, so `result` must invent it."""
    what = waits_for(func, args, kwargs)
    return what not in (None, "check for errors") or (func in INDEX_PUTS and bool(_masks(args[1])))


def result(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], answer: Answer) -> Any:
    """Return the result of an operator for which `has_unknown_result` is True.

    Must run in the `FakeTensorMode` of its tensors.
    """
    first = args[0]
    what = waits_for(func, args, kwargs)
    if what == "item":
        return _python_number(answer(1), first.dtype)
    if what == "equal":
        return bool(answer(1))
    if func in INDEX_PUTS:
        return torch.empty_like(first) if func is _aten.index_put.default else first
    return _of_unknown_length(what, args, kwargs, answer)


def _of_unknown_length(
    what: str | None, args: Sequence[Any], kwargs: dict[str, Any], answer: Answer
) -> Any:
    """Return a result whose length is the device's answer."""
    first = args[0]
    if what == "bincount":
        least = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
        return first.new_empty(max(least, answer(least)), dtype=torch.int64)
    if what == "repeat_interleave":
        return first.new_empty(answer(first.numel()), dtype=torch.int64)
    if what == "index by a mask":
        return _aten.index.Tensor(first, _without_masks(args[1], answer))
    n = min(answer(first.numel()), first.numel())
    if what == "nonzero":
        return _int64(first, first.dim(), n).T
    found = first.new_empty((n, *first.shape[1:]) if what == "unique_dim" else (n,))
    if what == "masked_select":
        return found
    return found, _int64(first, *first.shape), _int64(first, n)


def _without_masks(indices: Sequence[Any], answer: Answer) -> list[Any]:
    """Return indices in which each mask is replaced by what its `nonzero` would return."""
    masks = _masks(indices)
    n = min(answer(masks[0].numel()), masks[0].numel())
    replaced: list[Any] = []
    for index in indices:
        is_mask = index is not None and index.dtype in MASK_DTYPES
        replaced += [_int64(index, n)] * index.dim() if is_mask else [index]
    return replaced


def _masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [index for index in indices if index is not None and index.dtype in MASK_DTYPES]


def _int64(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.int64)


def _python_number(number: int, dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return bool(number)
    return float(number) if dtype.is_floating_point else number
