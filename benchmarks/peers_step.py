"""Time one peer's own training step. Runs inside `.venv-peers`; `benchmarks.peers` calls it.

The step is the peer's code from end to end: its trainer's forward, loss, backward, clipping,
optimiser, schedule, decoder normalisation and dead-latent bookkeeping; nothing of it is rebuilt.
Adam is switched to torch's fused kernel, which all three could use and none does by default, unless
`adam` is "stock".
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

from benchmarks.timing import PeakMemory, interleaved
from benchmarks.yardstick import encoder_gemms

# A schedule longer than any benchmark: the step under the clock is one at full learning rate.
STEPS = 1_000_000
CONTEXT_TOKENS = 64
WARMUP_STEPS = 2

Step = Callable[[], object]


def saelens_step(work: dict[str, Any], x: Tensor) -> tuple[Step, list[Any]]:
    """`SAETrainer.step` on a TopK training SAE with the package's defaults."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=work["D"], d_sae=work["L"], k=work["k"]))
    config = SAETrainerConfig(
        total_training_samples=STEPS * work["B"],
        train_batch_size_samples=work["B"],
        lr_end=3e-5,  # must be given, though the default schedule is constant
    )
    trainer: Any = SAETrainer(config, sae, data_provider=iter(()))
    return lambda: trainer.step(x), [trainer.optimizer]


def dictionary_learning_step(work: dict[str, Any], x: Tensor) -> tuple[Step, list[Any]]:
    """`TopKTrainer.update` with the package's defaults."""
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
    # Step 0 would set the bias to the geometric median, which is not part of a step.
    return lambda: trainer.update(1, x), [trainer.optimizer]


def sparsify_step(work: dict[str, Any], x: Tensor) -> tuple[Step, list[Any]]:
    """`Trainer.fit` over a data set of one batch, so that one call is one step.

    Its trainer takes activations from a hook in a language model; here a single module hands out x.
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
    trainer.save = lambda: None  # fit saves at its end, which is not part of a step
    return trainer.fit, trainer.optimizers


class _OneBatch(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Token ids of one batch [rows, context]; the trainer skips what it has seen with `select`."""

    def __init__(self, rows: int, context: int) -> None:
        self.rows, self.context = rows, context

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        return {"input_ids": torch.zeros(self.context, dtype=torch.long)}

    def select(self, _indices: object) -> _OneBatch:
        return self


class _ActivationModel(nn.Module):
    """As much of a language model as the trainer looks at: one module, whose output is x [B, D]."""

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
    """One row: the peer's step beside the yardstick GEMM, interleaved in this process."""
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
        # A hook that did not fire or a loop that ended early would make for splendid figures.
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
    """Measure one peer and write its row as JSON to the file named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("work", help='JSON: {"L": ..., "D": ..., "B": ..., "k": ...}')
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):  # sparsify prints on every call of fit
        row = measure(arguments.peer, json.loads(arguments.work), arguments.rounds)
    arguments.out.write_text(json.dumps(row))


if __name__ == "__main__":
    main()
