"""Read SAEs that other libraries wrote.

Apart from the exporters, only this file uses the other libraries' names.

cfg.json, sae_weights.safetensors    SAELens 6: topk, standard, jumprelu, gated
cfg.json, sae.safetensors            sparsify: TopK
ae.pt, or any *.pt                   dictionary_learning: AutoEncoderTopK, AutoEncoder,
                                     GatedAutoEncoder, JumpReluAutoEncoder; only with allow_pt=True

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
from foundation.errors import ConfigError
from foundation.registry import Registry
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
from sae_core.peer_dictionary_learning import from_state
from sae_core.peer_rows import (
    row_slice,
    settings_of,
    with_positive_threshold,
    with_subtracted_bias,
    with_unit_decoder,
)

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
    "lp_norm",
    "l1_coefficient",
    "l1_warm_up_steps",
    "l0_coefficient",
    "l0_warm_up_steps",
    "target_l0",
    "pre_act_loss_coefficient",
    "jumprelu_init_threshold",
    "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale",
    "jumprelu_ste_to_input",
}
_SAELENS_KINDS = {
    "topk": ("topk", {}),
    "standard": ("relu", {}),
    "jumprelu": ("jumprelu", {"threshold": "threshold"}),
    "gated": ("gated", {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}),
}
"""Our architecture, and the names of its vectors if they differ, by SAELens' architecture."""
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
    """A file format in which another library saves an SAE."""

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
    """dictionary_learning's `ae.pt`, a pickle of tensors.

    `sae_core.peer_dictionary_learning` lists the classes.
    """

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
        if isinstance(state, dict) and "pre_bias" in state:
            raise CheckpointError(
                f"{file}: expected an SAE on raw activations, found an SAE of "
                "openai/sparse_autoencoder, which normalises each token by its own mean and "
                "standard deviation"
            )
        return from_state(state, file)


class SAELens(PeerFormat):
    """A folder that SAELens 6 writes.

    With `rescale_acts_by_decoder_norm`, latents are scaled by the norms of the decoder's rows
    before the selection. The norms are folded into the weights. Without `apply_b_dec_to_input`, as
    in Gemma Scope, the product of the encoder with `b_dec` is added to the biases.
    """

    def recognises(self, path: Path) -> bool:
        """Return True for a folder with both files."""
        return _has(path, "cfg.json", "sae_weights.safetensors")

    def open(self, path: Path, allow_pt: bool) -> StoredSAE:
        """Open the tensors; W_enc is read at once, the others on demand."""
        cfg = read_json(path / "cfg.json", _MAX_CONFIG_BYTES)
        kind = cfg.get("architecture")
        if kind not in _SAELENS_KINDS:
            raise ValueError(f"architecture={kind!r:.80}, expected one of {list(_SAELENS_KINDS)}")
        ours, names = _SAELENS_KINDS[kind]
        rescaled = ours == "topk" and bool(cfg.get("rescale_acts_by_decoder_norm", False))
        subtracted = bool(cfg.get("apply_b_dec_to_input", True))
        _expect(
            cfg,
            _SAELENS_HARMLESS,
            architecture=kind,
            apply_b_dec_to_input=subtracted,
            normalize_activations="none",
            reshape_activations="none",
            rescale_acts_by_decoder_norm=rescaled,
        )
        tensors = open_tensors(path / "sae_weights.safetensors")
        metadata = cfg.get("metadata") or {}
        config = settings_of(ours, cfg["d_sae"], metadata.get("hf_hook_name"), cfg.get("k"))
        names = {name: names.get(name, name) for name in (*row_names(config), "b_dec")}
        shapes = {ours: tensors[name].shape for ours, name in names.items() if name in tensors}
        check_shapes(config, shapes | {"W_enc": shapes["W_enc"][::-1]})
        # W_enc is [D, L] on disk, so every row holds a part of each block of latents.
        encoder = tensors["W_enc"].whole().float().T
        rows: dict[str, Rows] = {
            name: partial(_float_rows, tensors[names[name]]) for name in row_names(config)
        }
        rows["W_enc"] = partial(row_slice, encoder)
        b_dec = tensors["b_dec"].whole().float()
        if rescaled:
            rows = with_unit_decoder(rows)
        if not subtracted:
            rows = with_subtracted_bias(rows, b_dec)
        rows = with_positive_threshold(rows)
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
        return from_tensors(settings_of("topk", n_latents, path.name, cfg["k"]), ours)


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


def open_set(key: str, path: str) -> StoredSAE:
    """Open the SAE that a setting names.

    Args:
        key: Name of the setting, such as `train.init_from`.
        path: Its value.

    Raises:
        ConfigError: If there is no SAE that can be read.
    """
    try:
        return open_any(Path(path))
    except CheckpointError as error:
        raise ConfigError(key, path, "an SAE", str(error)) from error


def open_peer(peer: PeerFormat, path: Path, allow_pt: bool) -> StoredSAE:
    """Open an SAE of another library.

    Raises:
        CheckpointError: If it is not a supported SAE, or is a pickle and `allow_pt` is False.
    """
    try:
        return peer.open(path, allow_pt)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a supported SAE: {error!r}") from error


def _has(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)


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
