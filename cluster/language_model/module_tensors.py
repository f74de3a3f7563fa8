"""The hookpoint kinds `output` and `input`: a tensor that a module outputs or takes as input.

Options: `item` names an element of a tuple, dictionary or dataclass, or an argument; `head` selects
the slice of one attention head in the last dimension.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cluster.language_model.errors import ModelError
from cluster.language_model.hookpoint_kinds import HookpointKind, Visit
from cluster.language_model.sizes import head_width, text_config
from conf.hookpoint import Hookpoint
from foundation.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

_USUAL = ("0", "last_hidden_state", "hidden_states")
"""Elements that are taken without the option `item`: the first one of a tuple, or these names."""


class _ModuleTensor(HookpointKind):
    """A tensor [contexts, context_tokens, W] among a module's outputs or inputs."""

    name: ClassVar[str]

    def check(self, hookpoint: Hookpoint) -> None:
        """Check that the options are `head=NUMBER` and `item=NAME_OR_NUMBER`, if any."""
        options = dict(hookpoint.options)
        head = options.get("head", "0")
        if options.keys() - {"head", "item"} or not head.isdecimal():
            raise ConfigError(
                "model.hookpoints",
                str(hookpoint),
                "no options other than head=NUMBER, counted from 0, and item=NAME or item=NUMBER",
            )

    def width(self, hookpoint: Hookpoint, config: Any) -> int:
        """Return the width of a head or of the residual stream."""
        return head_width(config) if "head" in dict(hookpoint.options) else config.hidden_size

    def _visited(
        self, values: Mapping[str, Any], model: nn.Module, hookpoint: Hookpoint, visit: Visit
    ) -> tuple[str, Tensor] | None:
        """Call `visit` with the hookpoint's tensor among the named values.

        Returns:
            The name of the value to replace, and its replacement; None if nothing is replaced.
        """
        import torch

        options = dict(hookpoint.options)
        name = _chosen(values, options.get("item"), hookpoint)
        whole = values[name]
        if "head" not in options or not isinstance(whole, torch.Tensor):
            replaced = visit(whole)
            return None if replaced is None else (name, replaced)
        columns = _columns(int(options["head"]), whole.shape[-1], model, hookpoint)
        part = visit(whole[..., columns])
        if part is None:
            return None
        replaced = whole.clone()
        replaced[..., columns] = part
        return name, replaced


class OutputKind(_ModuleTensor):
    """The output of a module."""

    name = "output"
    works_with_shards = True

    def attach(
        self, model: nn.Module, module: nn.Module, hookpoint: Hookpoint, visit: Visit
    ) -> RemovableHandle:
        """Register a forward hook."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            found = self._visited(elements(output), model, hookpoint, visit)
            return None if found is None else _with_element(output, *found)

        return module.register_forward_hook(hook)


class InputKind(_ModuleTensor):
    """The inputs of a module: its arguments, by position or name."""

    name = "input"

    def attach(
        self, model: nn.Module, module: nn.Module, hookpoint: Hookpoint, visit: Visit
    ) -> RemovableHandle:
        """Register a hook before the forward pass of the module."""

        def hook(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            values = {str(i): value for i, value in enumerate(given)} | named
            found = self._visited(values, model, hookpoint, visit)
            if found is None:
                return None
            name, tensor = found
            if name in named:
                return given, {**named, name: tensor}
            at = int(name)
            return (*given[:at], tensor, *given[at + 1 :]), named

        return module.register_forward_pre_hook(hook, with_kwargs=True)


def elements(output: Any) -> dict[str, Any]:
    """Return the elements of a tuple, list, dictionary or dataclass by name; others as "0"."""
    if isinstance(output, tuple | list):
        return {str(i): value for i, value in enumerate(output)}
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if dataclasses.is_dataclass(output):
        return {one.name: getattr(output, one.name) for one in dataclasses.fields(output)}
    return {"0": output}


def _with_element(output: Any, name: str, tensor: Tensor) -> Any:
    """Return a copy of a module's output, of the same type, with one element replaced."""
    if isinstance(output, tuple | list):
        values = [tensor if str(i) == name else value for i, value in enumerate(output)]
        if hasattr(output, "_replace"):  # a named tuple
            return type(output)(*values)
        return type(output)(values)
    if isinstance(output, Mapping):
        replaced: Any = copy.copy(output)
        replaced[name] = tensor
        return replaced
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{name: tensor})
    return tensor


def _chosen(values: Mapping[str, Any], item: str | None, hookpoint: Hookpoint) -> str:
    """Return the name of the value that the hookpoint selects.

    Raises:
        ModelError: If `item` is not there, or if it is needed to choose among several tensors.
    """
    import torch

    there = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    if item is not None and item in values:
        return item
    if item is None:
        for name in (*_USUAL, *(there if len(there) == 1 else ())):
            if name in values and (name in there or len(values) == 1):
                return name
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in there.items())
    wanted = "a tensor" if item is None else f"item {item!r}"
    raise ModelError(
        f"model.hookpoints: {wanted} not found at the {hookpoint.describe()}: expected one of its "
        f"tensors: {shapes or 'none'}; choose one with @{hookpoint.kind}[item=NAME]"
    )


def _columns(head: int, width: int, model: nn.Module, hookpoint: Hookpoint) -> slice:
    """Return the columns of a head.

    A tensor of W columns has W / (width of a head) heads. This also holds for the keys and values
    of grouped-query attention, which have fewer heads.

    Raises:
        ModelError: If the tensor is not divided into the model's heads, or has no such head.
    """
    config = text_config(model)
    size = head_width(config)
    n_heads = int(config.num_attention_heads)
    counts = {n_heads, int(getattr(config, "num_key_value_heads", None) or n_heads)}
    if width % size or width // size not in counts:
        raise ModelError(
            f"model.hookpoints: the {hookpoint.describe()} has width {width}: expected "
            f"{' or '.join(f'{count} heads' for count in sorted(counts))} of width {size}; leave "
            "out the option head, or choose the input of the attention's output projection"
        )
    if head >= width // size:
        raise ModelError(
            f"model.hookpoints: head={head} of {hookpoint.module!r}: expected 0 to "
            f"{width // size - 1}"
        )
    return slice(head * size, (head + 1) * size)


OUTPUT, INPUT = OutputKind(), InputKind()
