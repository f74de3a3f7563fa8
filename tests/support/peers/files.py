"""Write SAEs with the peers' own libraries, and what they compute; runs inside `.venv-peers`.

    python tests/support/peers/files.py FOLDER

Each SAE goes to its own folder, with `expected.safetensors`: x, latents and recon.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from safetensors.torch import save_file

L, D, K, ROWS = 96, 24, 7, 32


def randomise(module: torch.nn.Module) -> None:
    """Fill all parameters with random numbers; decoder rows get different norms."""
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape)


@torch.no_grad()
def write(folder: Path, sae: Any) -> None:
    """Write the rows, and the latents and reconstructions that the SAE computes for them."""
    x = torch.randn(ROWS, D)
    latents = sae.encode(x)
    outputs = {"x": x, "latents": latents, "recon": sae.decode(latents)}
    save_file(
        {name: t.contiguous() for name, t in outputs.items()}, folder / "expected.safetensors"
    )


def main() -> None:
    """Write one SAE of each kind."""
    torch.manual_seed(0)
    root = Path(sys.argv[1])
    for rescale in (False, True):
        folder = root / f"saelens-{'rescaled' if rescale else 'plain'}"
        config = TopKSAEConfig(d_in=D, d_sae=L, k=K, rescale_acts_by_decoder_norm=rescale)
        sae = TopKSAE(config)
        randomise(sae)
        sae.save_model(folder)
        write(folder, sae)
    for kind in (AutoEncoderTopK, BatchTopKSAE):
        folder = root / kind.__name__
        folder.mkdir()
        coder = kind(D, L, K)
        randomise(coder)
        coder.threshold.fill_(3.0)  # as after training
        torch.save(coder.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": kind.__name__, "activation_dim": D, "dict_size": L, "k": K}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
        write(folder, coder)


if __name__ == "__main__":
    main()
