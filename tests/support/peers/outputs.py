"""Load exports with the peers' own loaders and write their outputs; runs inside `.venv-peers`.

    python tests/support/peers/outputs.py CASE_FOLDER...

A case folder contains `export/`, with the folders of some peers, and `x.safetensors`. This script
adds `peers.safetensors` and `peers.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder

Outputs = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Outputs by name, and the facts that the loaded model states about itself."""


@torch.no_grad()
def saelens_outputs(folder: Path, x: torch.Tensor) -> Outputs:
    sae = SAE.load_from_disk(folder)
    latents = sae.encode(x)
    outputs = {"latents": latents, "decoded": sae.decode(latents), "recon": sae(x)}
    k = getattr(sae.cfg, "k", None)
    return outputs, {**sae.cfg.metadata.to_dict(), "k": k, "class": type(sae).__name__}


@torch.no_grad()
def sparsify_outputs(folder: Path, x: torch.Tensor) -> Outputs:
    (coder,) = SparseCoder.load_many(str(folder), local=True).values()
    encoded = coder.encode(x)
    latents = torch.zeros(len(x), coder.num_latents)
    latents.scatter_(1, encoded.top_indices, encoded.top_acts)
    decoded = coder.decode(encoded.top_acts, encoded.top_indices)
    outputs = {"latents": latents, "decoded": decoded, "recon": coder(x).sae_out}
    return outputs, {"k": coder.cfg.k, "num_latents": coder.num_latents}


@torch.no_grad()
def dictionary_learning_outputs(folder: Path, x: torch.Tensor) -> Outputs:
    coder = AutoEncoderTopK.from_pretrained(folder / "ae.pt")
    latents = coder.encode(x)
    outputs = {"latents": latents, "decoded": coder.decode(latents), "recon": coder(x)}
    return outputs, {"k": int(coder.k), "dict_size": coder.dict_size}


PEERS = {
    "saelens": saelens_outputs,
    "sparsify": sparsify_outputs,
    "dictionary_learning": dictionary_learning_outputs,
}


def main() -> None:
    for case in map(Path, sys.argv[1:]):
        x = load_file(case / "x.safetensors")["x"]
        tensors: dict[str, torch.Tensor] = {}
        facts: dict[str, dict[str, Any]] = {}
        for peer, outputs in PEERS.items():
            if not (case / "export" / peer).is_dir():
                continue
            computed, facts[peer] = outputs(case / "export" / peer, x)
            tensors |= {f"{peer}.{name}": value.contiguous() for name, value in computed.items()}
        save_file(tensors, case / "peers.safetensors")
        (case / "peers.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
