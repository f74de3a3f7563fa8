"""SAELens 6: `cfg.json`, `sae_weights.safetensors`, read back by `sae_lens.SAE.load_from_disk`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_core.atomic import write_json
from sae_core.stored import write_rows

if TYPE_CHECKING:
    from analysis.export.source import Source
    from sae_core.stored import StoredSAE

FORMAT_VERSION = "6.54.12"
"""The release this layout was checked against. Below 6 the loader drops the metadata silently."""

_RESIDUAL = re.compile(
    r"(?:model\.layers|model\.decoder\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)"
)


def write_saelens(sae: StoredSAE, source: Source, folder: Path) -> None:
    """Writes the folder. W_enc becomes [d_in, d_sae]; all is float32, in raw activation units.

    Its maths is ours: h = (x - b_dec) @ W_enc + b_enc; relu(topk(h)) @ W_dec + b_dec.
    """
    folder.mkdir(parents=True)
    names = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    write_rows(sae, folder / "sae_weights.safetensors", names, transposed="W_enc")
    write_json(folder / "cfg.json", saelens_config(sae, source))


def saelens_config(sae: StoredSAE, source: Source) -> dict[str, Any]:
    """The content of `cfg.json`."""
    return {
        "architecture": "topk",
        "d_in": sae.d_model,
        "d_sae": sae.config.n_latents,
        "k": sae.config.k,  # left out, the loader takes 100 without a word
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,  # decoder rows have unit norm
        "metadata": {
            "sae_lens_version": FORMAT_VERSION,
            "sae_lens_training_version": None,  # else the loader claims its own version trained it
            "model_name": source.model,
            "hook_name": hook_name(source.hookpoint),
            "hf_hook_name": source.hookpoint,
            "context_size": source.context_tokens,
            "prepend_bos": True,
            "dataset_path": source.dataset,
        },
    }


def hook_name(hookpoint: str) -> str:
    """TransformerLens' name of a decoder layer's output; any other module keeps its own name."""
    layer = _RESIDUAL.fullmatch(hookpoint)
    return f"blocks.{layer[1]}.hook_resid_post" if layer else hookpoint
