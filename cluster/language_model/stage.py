"""Hookpoints stage: list the tensors of the model that can be harvested, with their widths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.language_model.loading import one_line
from cluster.language_model.model_checks import (
    NEEDS_VALUES,
    head_counts,
    model_without_weights,
)
from cluster.language_model.module_tensors import elements
from conf.schema.run import RunConfig

if TYPE_CHECKING:
    from torch import nn

_CONTEXTS, _TOKENS = 2, 3
_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass
class Row:
    """Modules of one name in several layers, whose tensors have the same widths."""

    module: str
    """Name of the module, with N in place of its layer number."""
    layers: list[int] = field(default_factory=list)
    """Numbers of the layers; empty if the name has none."""
    output: str = ""
    """Width of the output, and the option that chooses it; empty if it has no rows of tokens."""
    input: str = ""
    """Width of the input, likewise."""
    dtype: str = ""


def run(config: RunConfig, run_dir: Path) -> None:
    """Print the modules of `config.model` that have rows of tokens. Weights are not read.

    Raises:
        ModelError: If the model is not found.
    """
    console = Console()
    model = model_without_weights(config.model, Path(config.cache_dir))
    rows, failure = list_hookpoints(model)
    table = Table("module", "layers N", "output", "@input", "dtype", box=None, header_style="bold")
    for row in rows:
        table.add_row(row.module, _ranges(row.layers), row.output, row.input, row.dtype)
    console.print(table)
    sizes = ", ".join(f"{count} of width {width}" for count, width in head_counts(model))
    for line in (
        "the numbers are widths; a hookpoint is MODULE, with a layer number in place of N, or "
        "MODULE@input for its input",
        f"[head=0] and so on take one attention head: {sizes}" if sizes else "",
        f"the pass without weights ended early, so later modules are missing: {failure}"
        if failure
        else "",
    ):
        if line:
            console.print(f"hookpoints: {line}", markup=False, highlight=False, soft_wrap=True)


def list_hookpoints(model: nn.Module) -> tuple[list[Row], str]:
    """List the modules whose output or input has a row for each token, by running the model.

    Modules that run several times are left out.

    Args:
        model: The model, on any device; the meta device is enough. It is run on two contexts.

    Returns:
        The modules in the order in which the model has them, and why the pass ended early, or "".
    """
    import torch

    outputs: dict[str, list[Any]] = {}
    inputs: dict[str, dict[str, Any]] = {}

    def leave(name: str, _module: nn.Module, _given: Any, output: Any) -> None:
        outputs.setdefault(name, []).append(output)

    def enter(name: str, _module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs[name] = {str(i): value for i, value in enumerate(given)} | named

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(partial(leave, name)))
            handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
    device = next(model.parameters()).device
    ids = torch.zeros(_CONTEXTS, _TOKENS, dtype=torch.int64, device=device)
    failure = ""
    try:
        with torch.inference_mode(), device:
            model(input_ids=ids, use_cache=False, attention_mask=torch.ones_like(ids))
    except NEEDS_VALUES as error:
        failure = one_line(error)
    finally:
        for handle in handles:
            handle.remove()
    rows: dict[tuple[str, ...], Row] = {}
    for name, _ in model.named_modules():
        if len(outputs.get(name, ())) != 1:
            continue
        output, dtype = _widths(elements(outputs[name][0]))
        taken, _ = _widths(inputs[name])
        if not output and not taken:
            continue
        pattern = _LAYER.sub("N", name, count=1)
        row = rows.setdefault(
            (pattern, output, taken, dtype), Row(pattern, [], output, taken, dtype)
        )
        row.layers += [int(number) for number in _LAYER.findall(name)[:1]]
    return list(rows.values()), failure


def _widths(values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the widths of the values that have a row for each token, and the first one's dtype.

    A hookpoint selects the first by default; the others need the option `item`.
    """
    import torch

    found = {
        name: value
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.shape[:-1] in ((_CONTEXTS, _TOKENS), (_CONTEXTS * _TOKENS,))
    }
    usual = {"0", "hidden_states", "last_hidden_state"}
    widths = [
        f"{value.shape[-1]}" + ("" if name in usual or len(values) == 1 else f" [item={name}]")
        for name, value in found.items()
    ]
    dtype = next((str(value.dtype).removeprefix("torch.") for value in found.values()), "")
    return ", ".join(widths), dtype


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers as ranges: 0-2, 4."""
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)
