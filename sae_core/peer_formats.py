"""Read TopK SAEs that other libraries wrote.

Apart from the exporters, only this file uses the other libraries' names.

cfg.json, sae_weights.safetensors    SAELens 6
cfg.json, sae.safetensors            sparsify
ae.pt, or any *.pt                   dictionary_learning's AutoEncoderTopK; only with allow_pt=True

To add a format, subclass `PeerFormat` and register an instance in `PEER_FORMATS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foundation.atomic_files import read_json
from foundation.registry import Registry
from sae_core.architectures.topk.settings import TopKConfig
from sae_core.checkpoint.folder import MANIFEST
from sae_core.checkpoint.row_ranges import StoredTensor
from sae_core.checkpoint.stored_sae import (
    CONFIG_FILE,
    Rows,
    StoredSAE,
    check_shapes,
    from_tensors,
    open_sae,
    open_tensors,
    row_names,
)
from sae_core.config import CHECKPOINTS
from sae_core.errors import CheckpointError

_MAX_CONFIG_BYTES = 1 << 20
# Keys of `cfg.json` that do not affect what the SAE computes. Any other unknown key is rejected,
# because it may change the result.
_SAELENS_HARMLESS = {"d_in", "d_sae", "dtype", "device", "metadata", "k"} | {
    # settings of training
    "aux_loss_coefficient",
    "decoder_init_norm",
    "use_sparse_activations",
    "noise_sigma",
    "mse_loss_normalization",
}
_SPARSIFY_HARMLESS = {"d_in", "k", "num_latents", "expansion_factor"} | {
    # settings of training
    "multi_topk",
    "normalize_decoder",
}
_SPARSIFY = {
    "encoder.weight": "W_enc",
    "W_dec": "W_dec",
    "encoder.bias": "b_enc",
    "b_dec": "b_dec",
}


class PeerFormat(ABC):
    """A file format in which another library saves a TopK SAE."""

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Return True if `path` looks like an SAE of this format; must not raise."""

    @abstractmethod
    def open(self, path: Path, allow_pt: bool) -> StoredSAE:
        """Open the SAE.

        Args:
            path: A path that `recognises` accepted.
            allow_pt: True if pickles may be read, with torch's restricted loader.

        Raises:
            CheckpointError: If the file is a pickle and `allow_pt` is False.
            ValueError, KeyError, TypeError, ...: If the content is not a supported SAE; the caller
                reports these as a CheckpointError.
        """


class DictionaryLearning(PeerFormat):
    """dictionary_learning's AutoEncoderTopK, a pickle of tensors."""

    def recognises(self, path: Path) -> bool:
        """Return True for a `.pt` file, or a folder with `ae.pt`."""
        return (path.suffix == ".pt" and path.is_file()) or (path / "ae.pt").is_file()

    def open(self, path: Path, allow_pt: bool) -> StoredSAE:
        """Read the file with torch's restricted loader."""
        file = path if path.is_file() else path / "ae.pt"
        if not allow_pt:
            raise CheckpointError(
                f"{file} is a pickle: expected safetensors; if you trust its source, use "
                "load_sae(path, allow_pt=True), which reads only tensors and plain values from it"
            )
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a malicious file can raise anything here
            raise CheckpointError(
                f"{file}: torch's restricted loader could not read the file: "
                f"{type(error).__name__}: {error}"
            ) from error
        _require_topk(file, state)
        if isinstance(state, dict) and "pre_bias" in state:
            raise CheckpointError(
                f"{file}: expected an SAE on raw activations, found an SAE of "
                "openai/sparse_autoencoder, which normalises each token by its own mean and "
                "standard deviation"
            )
        return _from_dictionary_learning(state, file)


class SAELens(PeerFormat):
    """A folder that SAELens 6 writes.

    With `rescale_acts_by_decoder_norm`, latents are scaled by the norms of the decoder's rows
    before the selection. The norms are folded into the weights.
    """

    def recognises(self, path: Path) -> bool:
        """Return True for a folder with both files."""
        return _has(path, "cfg.json", "sae_weights.safetensors")

    def open(self, path: Path, allow_pt: bool) -> StoredSAE:
        """Open the tensors; W_enc is read at once, the others on demand."""
        cfg = read_json(path / "cfg.json", _MAX_CONFIG_BYTES)
        rescaled = bool(cfg.get("rescale_acts_by_decoder_norm", False))
        _expect(
            cfg,
            _SAELENS_HARMLESS,
            architecture="topk",
            apply_b_dec_to_input=True,
            normalize_activations="none",
            reshape_activations="none",
            rescale_acts_by_decoder_norm=rescaled,
        )
        tensors = open_tensors(path / "sae_weights.safetensors")
        metadata = cfg.get("metadata") or {}
        config = _config(cfg["k"], cfg["d_sae"], metadata.get("hf_hook_name"))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        check_shapes(config, shapes | {"W_enc": shapes["W_enc"][::-1]})
        # W_enc is [D, L] on disk, so every row holds a part of each block of latents.
        encoder = tensors["W_enc"].whole().float().T
        rows: dict[str, Rows] = {
            "W_enc": partial(_slice, encoder),
            "W_dec": partial(_float_rows, tensors["W_dec"]),
            "b_enc": partial(_float_rows, tensors["b_enc"]),
        }
        if rescaled:
            rows = _with_unit_decoder(rows)
        b_dec = tensors["b_dec"].whole().float()
        return StoredSAE(config, len(b_dec), b_dec, rows, 0, metadata)


class Sparsify(PeerFormat):
    """A folder that sparsify writes for one hookpoint."""

    def recognises(self, path: Path) -> bool:
        """Return True for a folder with both files."""
        return _has(path, "cfg.json", "sae.safetensors")

    def open(self, path: Path, allow_pt: bool) -> StoredSAE:
        """Open the tensors, which are read on demand."""
        cfg = read_json(path / "cfg.json", _MAX_CONFIG_BYTES)
        _expect(
            cfg,
            _SPARSIFY_HARMLESS,
            activation="topk",
            transcode=False,
            skip_connection=False,
            signed=False,
        )
        n_latents = cfg.get("num_latents") or cfg["expansion_factor"] * cfg["d_in"]
        tensors = open_tensors(path / "sae.safetensors")
        ours = {_SPARSIFY[name]: tensor for name, tensor in tensors.items() if name in _SPARSIFY}
        return from_tensors(_config(cfg["k"], n_latents, path.name), ours)


DICTIONARY_LEARNING = DictionaryLearning()
SAELENS = SAELens()
SPARSIFY = Sparsify()

PEER_FORMATS: Registry[PeerFormat] = Registry(
    kind="peer format",
    key="path",
    group="peer_formats",
    builtin={
        "dictionary_learning": "sae_core.peer_formats:DICTIONARY_LEARNING",
        "saelens": "sae_core.peer_formats:SAELENS",
        "sparsify": "sae_core.peer_formats:SPARSIFY",
    },
)


def find(path: Path) -> PeerFormat | None:
    """Return the first format that recognises `path`, or None."""
    if any((path / name).exists() for name in (CONFIG_FILE, MANIFEST, CHECKPOINTS)):
        return None  # our own format takes precedence, even next to files of others
    return next((peer for _, peer in PEER_FORMATS.items() if peer.recognises(path)), None)


def open_any(
    path: Path, name: str | None = None, verify_hashes: bool = True, allow_pt: bool = False
) -> StoredSAE:
    """Open an SAE of ours (see `open_sae`) or of another library.

    Args:
        path: Run, checkpoint, saved SAE, or folder or file of another library.
        name: Name of the SAE. It may be None if there is only one.
        verify_hashes: Verify the SHA-256 of every file of a checkpoint first.
        allow_pt: True if pickles may be read, with torch's restricted loader.

    Raises:
        CheckpointError: If no SAE is found, or it is damaged or of another kind.
    """
    peer = find(path)
    if peer is None:
        return open_sae(path, name, verify_hashes)
    return open_peer(peer, path, allow_pt)


def open_peer(peer: PeerFormat, path: Path, allow_pt: bool) -> StoredSAE:
    """Open an SAE of another library.

    Raises:
        CheckpointError: If it is not a supported TopK SAE, or is a pickle and `allow_pt` is False.
    """
    try:
        return peer.open(path, allow_pt)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a supported TopK SAE: {error!r}") from error


def _has(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)


def _require_topk(file: Path, state: Any) -> None:
    """Check that a file holds an AutoEncoderTopK.

    Other classes have tensors of the same names, but select latents differently. `config.json`
    names the class.

    Raises:
        CheckpointError: If it names another class, or is missing where it is needed.
    """
    config = file.parent / "config.json"
    if not config.is_file():
        threshold = state.get("threshold") if isinstance(state, dict) else None
        if threshold is None or float(threshold) < 0:
            return  # no threshold was learned, so it can only be the k largest
        raise CheckpointError(
            f"{config} not found: expected it next to the SAE, because AutoEncoderTopK and "
            "BatchTopKSAE have the same tensors but select latents in different ways; copy it there"
        )
    trainer = read_json(config, _MAX_CONFIG_BYTES).get("trainer") or {}
    found = trainer.get("dict_class")
    if found != "AutoEncoderTopK":
        raise CheckpointError(
            f"{config}: trainer.dict_class={found!r:.80}: expected 'AutoEncoderTopK'; other kinds "
            "of SAEs cannot be read yet"
        )


def _with_unit_decoder(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """Return rows of an SAE with unit decoder rows whose latents are scaled by the original norms.

    Such an SAE selects the latents with the largest norm times pre-activation, and reconstructs the
    same.
    """
    decoder = rows["W_dec"]

    def norms(start: int, stop: int) -> torch.Tensor:
        return decoder(start, stop).norm(dim=1).clamp_min(1e-30)

    return {
        "W_enc": lambda start, stop: rows["W_enc"](start, stop) * norms(start, stop)[:, None],
        "b_enc": lambda start, stop: rows["b_enc"](start, stop) * norms(start, stop),
        "W_dec": lambda start, stop: decoder(start, stop) / norms(start, stop)[:, None],
    }


def _from_dictionary_learning(state: Any, file: Path) -> StoredSAE:
    for name in ("encoder.weight", "decoder.weight", "encoder.bias", "b_dec"):
        _expect_plain(name, state[name])
    tensors = {
        "W_enc": state["encoder.weight"],
        "W_dec": state["decoder.weight"].T,
        "b_enc": state["encoder.bias"],
        "b_dec": state["b_dec"],
    }
    config = _config(int(state["k"]), len(tensors["b_enc"]), None)
    width = check_shapes(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    rows = {name: partial(_slice, tensors[name]) for name in row_names(config)}
    return StoredSAE(config, width, tensors["b_dec"].float(), rows, 0, {"file": file.name})


def _expect_plain(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor is dense and that the file holds all of its numbers.

    A malicious file could otherwise declare a large shape over little data and exhaust memory.
    """
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not (plain and tensor.is_floating_point()) or (
        tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize
    ):
        raise ValueError(f"{name}: expected a plain tensor of floating-point numbers")


def _config(k: Any, n_latents: Any, hookpoint: Any) -> TopKConfig:
    if isinstance(k, float) and k.is_integer():
        k = int(k)
    if type(k) is not int or type(n_latents) is not int:
        raise ValueError(f"k={k!r:.40}, n_latents={n_latents!r:.40}: expected whole numbers")
    name = hookpoint if isinstance(hookpoint, str) else None
    return TopKConfig(k=k, n_latents=n_latents, hookpoint=name)


def _expect(cfg: Mapping[str, Any], harmless: Collection[str], **values: Any) -> None:
    """Check that a config describes an SAE that computes the same as ours.

    Args:
        cfg: The config.
        harmless: Keys that may have any value.
        values: Keys that must have this value, or be absent.

    Raises:
        ValueError: If a key has another value, or is not known.
    """
    unknown = sorted(cfg.keys() - values.keys() - set(harmless))
    if unknown:
        raise ValueError(f"unknown keys {unknown}, which may change what the SAE computes")
    for key, value in values.items():
        if cfg.get(key, value) != value:
            raise ValueError(f"{key}={cfg[key]!r:.80}, expected {value!r}")


def _float_rows(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    return tensor.rows(start, stop).float()


def _slice(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return tensor[start:stop].float()
