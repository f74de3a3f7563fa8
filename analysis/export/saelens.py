"""Export for SAELens 6: `cfg.json` and `sae_weights.safetensors`.

`sae_lens.SAE.load_from_disk` loads the folder. Its names for our architectures: topk, and relu as
`standard`, jumprelu, gated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.export.formats import ExportFormat
from conf.hookpoint import parse_hookpoint
from foundation.atomic_files import write_json
from sae_core.architectures.topk.settings import TopKConfig
from sae_core.checkpoint.stored_sae import write_rows

if TYPE_CHECKING:
    from analysis.origin import Source
    from sae_core.checkpoint.stored_sae import StoredSAE

FORMAT_VERSION = "6.54.12"
"""SAELens release that this layout was tested with; releases before 6 silently drop metadata."""

_RESIDUAL = re.compile(
    r"(?:model\.layers|model\.decoder\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)"
)


class _Kind(NamedTuple):
    """How SAELens stores one of our architectures."""

    name: str
    """SAELens' name of the architecture."""
    tensors: Mapping[str, str]
    """Names in the file, keyed by ours."""


_SHARED = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_KINDS = {
    "topk": _Kind("topk", _SHARED | {"b_enc": "b_enc"}),
    "relu": _Kind("standard", _SHARED | {"b_enc": "b_enc"}),
    "jumprelu": _Kind("jumprelu", _SHARED | {"b_enc": "b_enc", "threshold": "threshold"}),
    "gated": _Kind("gated", _SHARED | {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}),
}


class SAELens(ExportFormat):
    """SAELens 6."""

    title = "SAELens 6"
    architectures = tuple(_KINDS)

    def write(self, sae: StoredSAE, source: Source, folder: Path) -> None:
        """Write `cfg.json` and `sae_weights.safetensors`.

        W_enc is transposed to [d_in, d_sae]. All tensors are float32. SAELens computes the same
        function, for topk: h = (x - b_dec) @ W_enc + b_enc; relu(topk(h)) @ W_dec + b_dec.
        """
        names = _KINDS[sae.config.architecture].tensors
        write_rows(sae, folder / "sae_weights.safetensors", names, transposed="W_enc")
        write_json(folder / "cfg.json", saelens_config(sae, source))

    def how_to_load(self, source: Source, folder: str) -> str:
        """Return the code that loads the folder."""
        return f'from sae_lens import SAE\nsae = SAE.load_from_disk("{folder}")'


SAELENS = SAELens()


def saelens_config(sae: StoredSAE, source: Source) -> dict[str, Any]:
    """Return the content of `cfg.json`."""
    own: dict[str, Any] = {}
    if isinstance(sae.config, TopKConfig):
        own = {
            "k": sae.config.k,  # without this key the loader silently uses 100
            "rescale_acts_by_decoder_norm": False,  # latents are selected by their own size
        }
    return {
        "architecture": _KINDS[sae.config.architecture].name,
        "d_in": sae.d_model,
        "d_sae": sae.config.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **own,
        "metadata": {
            "sae_lens_version": FORMAT_VERSION,
            # Without this key the loader claims that its own version trained the SAE.
            "sae_lens_training_version": None,
            "model_name": source.model,
            "hook_name": hook_name(source.hookpoint),
            "hf_hook_name": source.hookpoint,
            "context_size": source.context_tokens,
            "prepend_bos": source.begins_with_bos is not False,
            "dataset_path": source.dataset,
        },
    }


def hook_name(hookpoint: str) -> str:
    """Return TransformerLens' name for the output of a decoder layer; keep any other name."""
    # In its shortest form, the hookpoint of a module's output is the module's name.
    layer = _RESIDUAL.fullmatch(str(parse_hookpoint(hookpoint)))
    return f"blocks.{layer[1]}.hook_resid_post" if layer else hookpoint
