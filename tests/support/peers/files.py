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
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
)
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
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


def write_saelens(folder: Path, sae: Any) -> None:
    """Write an SAE of SAELens with random parameters, some of whose thresholds are negative."""
    randomise(sae)
    if isinstance(sae, JumpReLUTrainingSAE):
        # With thresholds below 0, only its inference class applies a ReLU.
        sae.threshold.data.abs_()
    sae.save_model(folder)
    write(folder, sae)


def write_dictionary_learning(folder: Path, coder: Any) -> None:
    """Write an SAE of dictionary_learning with random parameters, and its config."""
    folder.mkdir()
    randomise(coder)
    torch.save(coder.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": type(coder).__name__, "activation_dim": D, "dict_size": L}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    write(folder, coder)


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
    for kind, settings in (
        (TopKSAE, TopKSAEConfig(d_in=D, d_sae=L, k=K)),
        *((StandardSAE, StandardSAEConfig(D, L, apply_b_dec_to_input=b)) for b in (True, False)),
        *((JumpReLUSAE, JumpReLUSAEConfig(D, L, apply_b_dec_to_input=b)) for b in (True, False)),
        *((GatedSAE, GatedSAEConfig(D, L, apply_b_dec_to_input=b)) for b in (True, False)),
        (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig(D, L)),
    ):
        way = "" if settings.apply_b_dec_to_input else "-unsubtracted"
        write_saelens(root / f"saelens-{kind.__name__}{way}", kind(settings))
    for kind in (AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder):
        write_dictionary_learning(root / kind.__name__, kind(D, L))
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
