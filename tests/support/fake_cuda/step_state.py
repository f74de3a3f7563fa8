"""Find the memory of a training step's state, which a replayed CUDA graph reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sae_core.engine.deepspeed_engine import SAEEngine

STATE = {
    "engine.first_bad_step",
    "engine._step_index",
    "optimizer.found_inf",
    "optimizer._global_grad_norm",
    "sae.tokens_since_fired",
    *(f"sae.{name}" for name in ("W_enc", "W_dec", "b_enc", "b_dec")),
    *(
        f"{name}.{part}"
        for name in ("W_enc", "W_dec", "b_enc", "b_dec")
        for part in ("step", "exp_avg", "exp_avg_sq")
    ),
}
"""Tensors that every step updates; names as in `state_of`."""
_WITHIN_A_STEP = {
    # Computed and used by the same step.
    "optimizer.grad_scale",
}


def state_of(engine: SAEEngine) -> dict[str, torch.Tensor]:
    """Return all tensors that are kept between two steps.

    These are the attributes of the engine, its SAE, its optimiser and DeepSpeed's engine that are
    tensors, and the optimiser's state. Keep the result: while a tensor lives, no other takes its
    memory.
    """
    found = dict(_attributes("engine", vars(engine)))
    found |= _attributes("deepspeed", vars(engine.engine))
    found |= _attributes("optimizer", vars(engine.optimizer))
    found |= _attributes("sae", vars(engine.sae))
    found |= {f"sae.{name}": tensor for name, tensor in engine.sae.named_parameters()}
    found |= {f"sae.{name}": tensor for name, tensor in engine.sae.named_buffers()}
    for name, parameter in engine.sae.named_parameters():
        found |= _attributes(name, engine.optimizer.state[parameter])
    for number, group in enumerate(engine.engine.optimizer.param_groups):
        found |= _attributes(f"group {number}", group)
    return {name: tensor for name, tensor in found.items() if name not in _WITHIN_A_STEP}


def moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of the tensors that are in different memory than before, new or gone."""
    common = before.keys() & after.keys()
    return (before.keys() ^ after.keys()) | {
        name for name in common if _memory(before[name]) != _memory(after[name])
    }


def rebind(engine: SAEEngine, name: str) -> None:
    """Replace a tensor of `state_of` by a copy in other memory, as a careless step would."""
    where, _, attribute = name.rpartition(".")
    holders: dict[str, Any] = {
        "engine": vars(engine),
        "optimizer": vars(engine.optimizer),
        "sae": engine.sae._buffers,
    }
    holder = holders.get(where)
    if holder is None:
        holder = engine.optimizer.state[engine.sae.get_parameter(where)]
    holder[attribute] = holder[attribute].clone()


def _attributes(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}.{name}", value


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
