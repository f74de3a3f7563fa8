"""Time one peer's own training step. Runs inside `.venv-peers`.

The step is entirely the peer's own code: its trainer's forward, loss, backward, clipping,
optimiser, schedule, decoder normalisation and dead-latent bookkeeping. Adam is switched to torch's
fused kernel unless `adam` is "stock". All three peers can use the fused kernel, but none does by
default.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.timing import PeakMemory, interleaved
from benchmarks.step.yardstick import encoder_gemms

# A schedule longer than any benchmark, so that the timed steps run at the full learning rate.
STEPS = 1_000_000
CONTEXT_TOKENS = 64
WARMUP_STEPS = 2

Step = Callable[[], object]


def saelens_step(work: dict[str, Any], x: Tensor) -> tuple[Step, list[Any]]:
    """Create a call of `SAETrainer.step` on a TopK training SAE with the package's defaults.

    Args:
        work: Sizes.
        x: Batch [B, D].

    Returns:
        The step, and the optimisers that it uses.
    """
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=work["D"], d_sae=work["L"], k=work["k"]))
    config = SAETrainerConfig(
        total_training_samples=STEPS * work["B"],
        train_batch_size_samples=work["B"],
        lr_end=3e-5,  # required, although the default schedule is constant
    )
    trainer: Any = SAETrainer(config, sae, data_provider=iter(()))
    return lambda: trainer.step(x), [trainer.optimizer]


def dictionary_learning_step(work: dict[str, Any], x: Tensor) -> tuple[Step, list[Any]]:
    """Create a call of `TopKTrainer.update` with the package's defaults; see `saelens_step`."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=STEPS,
        activation_dim=work["D"],
        dict_size=work["L"],
        k=work["k"],
        layer=0,
        lm_name="none",
        warmup_steps=1,
        seed=0,
        device="cpu",
    )
    # Step 0 would also set the bias to the geometric median, which is not part of a usual step.
    return lambda: trainer.update(1, x), [trainer.optimizer]


def sparsify_step(work: dict[str, Any], x: Tensor) -> tuple[Step, list[Any]]:
    """Create a call of `Trainer.fit` on a data set of one batch, so that one call is one step.

    This trainer takes activations from a hook in a language model. Here, a single module returns x.
    """
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    context = math.gcd(CONTEXT_TOKENS, work["B"])
    config = TrainConfig(
        SparseCoderConfig(num_latents=work["L"], k=work["k"]),
        batch_size=work["B"] // context,
        optimizer="adam",
        auxk_alpha=1 / 32,
        lr_warmup_steps=1,
        hookpoints=["source"],
        log_to_wandb=False,
    )
    data = _OneBatch(work["B"] // context, context)
    trainer: Any = Trainer(config, data, _ActivationModel(x, context))
    trainer.save = lambda: None  # fit saves when it ends, which is not part of a step
    return trainer.fit, trainer.optimizers


class _OneBatch(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Token ids of one batch [rows, context].

    The trainer calls `select` to skip rows that it has seen. Here, `select` keeps all rows, so that
    every call of `fit` trains on the whole batch.
    """

    def __init__(self, rows: int, context: int) -> None:
        self.rows = rows
        self.context = context

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        return {"input_ids": torch.zeros(self.context, dtype=torch.long)}

    def select(self, _indices: object) -> _OneBatch:
        return self


class _ActivationModel(nn.Module):
    """The parts of a language model that the trainer uses: one module whose output is x [B, D]."""

    def __init__(self, x: Tensor, context: int) -> None:
        super().__init__()
        self.source = nn.Identity()
        self.x = x.view(-1, context, x.shape[1])

    @property
    def base_model(self) -> _ActivationModel:
        return self

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def forward(self, input_ids: Tensor) -> Tensor:
        activations: Tensor = self.source(self.x)
        return activations


PEERS: dict[str, Callable[[dict[str, Any], Tensor], tuple[Step, list[Any]]]] = {
    "eai-sparsify": sparsify_step,
    "sae-lens": saelens_step,
    "dictionary-learning": dictionary_learning_step,
}


def measure(peer: str, work: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Time the peer's step and the yardstick GEMMs, interleaved; return one row."""
    torch.manual_seed(0)
    x = torch.randn(work["B"], work["D"])
    with PeakMemory() as memory:
        step, optimizers = PEERS[peer](work, x)
        if work.get("adam", "fused") == "fused":
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["fused"] = True
        for _ in range(WARMUP_STEPS):
            step()
    for optimizer in optimizers:
        # A hook that did not fire or a loop that ended early would make the peer look too fast.
        updates = {int(state["step"]) for state in optimizer.state.values()}
        assert updates == {WARMUP_STEPS}, f"{peer} made {updates} updates in {WARMUP_STEPS} steps"
    W_enc = torch.randn(work["L"], work["D"]) / work["D"] ** 0.5
    timings = interleaved(
        {"step": step, **encoder_gemms(x, W_enc, torch.zeros(work["L"]))}, rounds=rounds, warmup=1
    )
    seconds, gemm, linear = (timings[name].median_s for name in ("step", "gemm", "linear"))
    return {
        "work": work,
        "system": peer,
        "op": "train_step",
        "median_s": seconds,
        "ratio": seconds / gemm,
        "tokens_per_s": work["B"] / seconds,
        "peak_bytes": memory.bytes,
        "gemm_s": gemm,
        "linear_s": linear,
        "ratio_linear": seconds / linear,
        "version": importlib.metadata.version(peer),
    }


def main() -> None:
    """Measure one peer and write its row as JSON to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("work", help='JSON: {"L": ..., "D": ..., "B": ..., "k": ...}')
    parser.add_argument("--rounds", type=int, default=7, help="samples of the step and each GEMM")
    parser.add_argument("--out", type=Path, required=True, help="file to write the row to")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):  # sparsify prints on every call of fit
        row = measure(arguments.peer, json.loads(arguments.work), arguments.rounds)
    arguments.out.write_text(json.dumps(row))


if __name__ == "__main__":
    main()
