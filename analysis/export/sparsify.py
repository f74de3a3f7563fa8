"""Export for sparsify: `<hookpoint>/{cfg.json,sae.safetensors}`.

`SparseCoder.load_from_disk` loads the folder of one hookpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.export.formats import ExportFormat
from foundation.atomic_files import write_json
from sae_core.architectures.topk.settings import topk_settings
from sae_core.checkpoint.stored_sae import write_rows

if TYPE_CHECKING:
    from analysis.origin import Source
    from sae_core.checkpoint.stored_sae import StoredSAE


class Sparsify(ExportFormat):
    """EleutherAI's sparsify."""

    title = "sparsify"

    def write(self, sae: StoredSAE, source: Source, folder: Path) -> None:
        """Write `folder/<hookpoint>/`, where `SparseCoder.load_many(folder, local=True)` finds it.

        All tensors are float32, because the loader uses the dtype of the first tensor for all.
        """
        inside = folder / source.hookpoint
        inside.mkdir()
        names = {
            "W_enc": "encoder.weight",
            "b_enc": "encoder.bias",
            "W_dec": "W_dec",
            "b_dec": "b_dec",
        }
        write_rows(sae, inside / "sae.safetensors", names)
        write_json(inside / "cfg.json", sparsify_config(sae))

    def how_to_load(self, source: Source, folder: str) -> str:
        """Return the code that loads the folder of the hookpoint."""
        return (
            "from sparsify import SparseCoder\n"
            f'sae = SparseCoder.load_from_disk("{folder}/{source.hookpoint}")'
        )


SPARSIFY = Sparsify()


def sparsify_config(sae: StoredSAE) -> dict[str, Any]:
    """Return the content of `cfg.json`.

    `num_latents` takes precedence over `expansion_factor`, which must be a whole number.
    """
    return {
        "activation": "topk",
        "expansion_factor": max(sae.config.n_latents // sae.d_model, 1),
        "normalize_decoder": sae.config.map_shape(sae.d_model) is None,
        "num_latents": sae.config.n_latents,
        "k": topk_settings(sae.config).k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_model,
    }
