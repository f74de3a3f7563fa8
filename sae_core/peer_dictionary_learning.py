"""Read the classes of dictionary_learning from the tensors of an `ae.pt`.

class (`trainer.dict_class`)    ours        tensors
AutoEncoderTopK                 topk        encoder.weight, encoder.bias, decoder.weight, b_dec, k
AutoEncoder                     relu        encoder.weight, encoder.bias, decoder.weight, bias
GatedAutoEncoder                gated       encoder.weight, gate_bias, mag_bias, r_mag,
                                            decoder.weight, decoder_bias
JumpReluAutoEncoder             jumprelu    W_enc, b_enc, threshold, W_dec, b_dec
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foundation.atomic_files import read_json
from sae_core.checkpoint.stored_sae import Rows, StoredSAE, check_shapes, row_names
from sae_core.errors import CheckpointError
from sae_core.peer_rows import (
    row_slice,
    settings_of,
    with_positive_threshold,
    with_subtracted_bias,
)

_MAX_CONFIG_BYTES = 1 << 20


class _Kind(NamedTuple):
    """How the library stores one of its classes."""

    architecture: str
    """Our name of the architecture."""
    names: dict[str, str]
    """Names in the file, keyed by ours."""
    transposed: tuple[str, ...] = ("W_dec",)
    """Our names of the matrices whose latents are columns."""
    subtracts_b_dec: bool = True
    """False if the encoder does not subtract the decoder's bias."""


_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
_KINDS = {
    "AutoEncoderTopK": _Kind("topk", _LINEAR | {"b_enc": "encoder.bias", "b_dec": "b_dec"}),
    "AutoEncoder": _Kind("relu", _LINEAR | {"b_enc": "encoder.bias", "b_dec": "bias"}),
    "GatedAutoEncoder": _Kind(
        "gated",
        _LINEAR
        | {"b_enc": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"},
    ),
    "JumpReluAutoEncoder": _Kind(
        "jumprelu",
        {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")},
        transposed=("W_enc",),
        subtracts_b_dec=False,
    ),
}


def from_state(state: Any, file: Path) -> StoredSAE:
    """Return the SAE whose tensors torch's restricted loader has read from `file`.

    Raises:
        CheckpointError: If it is of another class, or `config.json` is missing where it is needed.
        ValueError, KeyError, TypeError, ...: If the content is not such an SAE.
    """
    kind = _KINDS[_class_of(file, state)]
    tensors: dict[str, torch.Tensor] = {}
    for ours, theirs in kind.names.items():
        _expect_plain(theirs, state[theirs])
        tensors[ours] = state[theirs].T if ours in kind.transposed else state[theirs]
    k = int(state["k"]) if kind.architecture == "topk" else None
    config = settings_of(kind.architecture, len(tensors["b_enc"]), None, k)
    width = check_shapes(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    rows: dict[str, Rows] = {name: partial(row_slice, tensors[name]) for name in row_names(config)}
    b_dec = tensors["b_dec"].float()
    if not kind.subtracts_b_dec:
        rows = with_subtracted_bias(rows, b_dec)
    return StoredSAE(config, width, b_dec, with_positive_threshold(rows), 0, {"file": file.name})


def _class_of(file: Path, state: Any) -> str:
    """Return the name of the library's class that wrote a file.

    `config.json` names the class. Without it, the names of the tensors tell all classes apart,
    except AutoEncoderTopK and those that select latents in another way.

    Raises:
        CheckpointError: If it names another class, or is missing where it is needed.
    """
    config = file.parent / "config.json"
    if config.is_file():
        trainer = read_json(config, _MAX_CONFIG_BYTES).get("trainer") or {}
        found = trainer.get("dict_class")
        if found in _KINDS:
            return str(found)
        raise CheckpointError(
            f"{config}: trainer.dict_class={found!r:.80}: expected one of {list(_KINDS)}; other "
            "kinds of SAEs cannot be read yet"
        )
    names = set(state) if isinstance(state, dict) else set()
    for name, kind in _KINDS.items():
        if kind.architecture != "topk" and names == set(kind.names.values()):
            return name
    threshold = state.get("threshold") if isinstance(state, dict) else None
    if threshold is None or float(threshold) < 0:
        return "AutoEncoderTopK"  # no threshold was learned, so it can only be the k largest
    raise CheckpointError(
        f"{config} not found: expected it next to the SAE, because AutoEncoderTopK and "
        "BatchTopKSAE have the same tensors but select latents in different ways; copy it there"
    )


def _expect_plain(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor is dense and that the file holds all of its numbers.

    A malicious file could otherwise declare a large shape over little data and exhaust memory.
    """
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not (plain and tensor.is_floating_point()) or (
        tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize
    ):
        raise ValueError(f"{name}: expected a plain tensor of floating-point numbers")
