"""Part `resume`: two runs are equal bit for bit, and so is one that was saved and resumed.

Where deepspeed and safetensors are installed, the runs use the trainer's engine and checkpoints.
Elsewhere they use the same SAE and optimiser without the engine, and save with `torch.save`.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.part import Context, Row, work_row
from benchmarks.step.ours import (
    DEAD_AFTER_TOKENS,
    DEAD_SHARE,
    PlainTrainer,
    Variant,
    fresh_sae,
    one_rank_mesh,
    trainer_config,
)
from benchmarks.step.work import Inputs
from sae_core.architectures.base import SparseAutoencoder
from sae_core.checkpoint import CheckpointSaver, CheckpointState, load_checkpoint
from sae_core.checkpoint.folder import checkpoint_name
from sae_core.config import CheckpointConfig, TrainerConfig
from sae_core.engine.deepspeed_engine import MOMENTS, SAEEngine
from sae_core.kernels import get_kernels

_LR = 1e-3
VARIANTS = (
    Variant("clip + auxk", clip=True, auxk_rows=1 / 8, lr=_LR),
    Variant("bfloat16 moments", moments="bfloat16", lr=_LR),
    Variant("float8 prefilter", clip=True, prefilter="float8", lr=_LR),
)
"""Settings of the runs. The learning rate is high, so that a few steps change the dictionary."""


class Run(ABC):
    """A training run: fresh weights, a batch per step, and its state.

    Args:
        context: Device and sizes.
        variant: Settings of the step.
        seed: Seed of the initial dictionary.
    """

    path: str
    """Name of the code that runs the steps and saves them."""

    def __init__(self, context: Context, variant: Variant, seed: int) -> None:
        self.context = context
        self.work = context.shapes.resumed
        self.config = trainer_config(Inputs(self.work, context.setup), variant)
        # "auto" would choose by time, and two runs might choose differently.
        prefilter = "none" if variant.prefilter == "auto" else variant.prefilter
        kernels = get_kernels(context.setup.kernels, context.setup.dtype, prefilter=prefilter)
        torch.manual_seed(seed)
        device = context.setup.device
        self.sae = fresh_sae(self.config.sae, self.work.D, kernels, device)
        dead = int(DEAD_SHARE * self.work.L)
        self.sae.tokens_since_fired[:dead] = DEAD_AFTER_TOKENS
        self.build(self.sae, self.config, device)

    @abstractmethod
    def build(self, sae: SparseAutoencoder, config: TrainerConfig, device: torch.device) -> None:
        """Create what trains the SAE."""

    @abstractmethod
    def train(self, raw: torch.Tensor, step: int) -> None:
        """Run one step on a batch."""

    @abstractmethod
    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return Adam's moments, `{parameter: {moment: tensor}}`."""

    @abstractmethod
    def save(self, folder: Path, step: int) -> None:
        """Write everything that a run needs to continue."""

    @abstractmethod
    def load(self, folder: Path, step: int) -> None:
        """Read what `save` has written."""

    def steps(self, first: int, stop: int) -> None:
        """Run the steps [first, stop); batch i depends on i only."""
        device = self.context.setup.device
        for step in range(first, stop):
            generator = torch.Generator(device).manual_seed(1000 + step)
            raw = torch.randn(self.work.B, self.work.D, device=device, generator=generator)
            self.train(raw, step)

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all weights, buffers and moments by name."""
        tensors = dict(self.sae.named_parameters()) | dict(self.sae.named_buffers())
        for parameter, own in self.moments().items():
            tensors |= {f"{parameter}.{moment}": tensor for moment, tensor in own.items()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


class PlainRun(Run):
    """A run without DeepSpeed, saved with `torch.save`."""

    path = "optimiser alone, torch.save"

    def build(self, sae: SparseAutoencoder, config: TrainerConfig, device: torch.device) -> None:
        """Create the trainer."""
        self.trainer = PlainTrainer(sae, config)
        self.trainer.optimizer.allocate_state()

    def train(self, raw: torch.Tensor, step: int) -> None:
        """Run one step."""
        self.trainer.train_step(raw, step)

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return Adam's moments."""
        state = self.trainer.optimizer.state
        return {
            name: {moment: state[parameter][moment] for moment in MOMENTS}
            for name, parameter in self.sae.named_parameters()
        }

    def save(self, folder: Path, step: int) -> None:
        """Write the state dict and the moments."""
        content = {"sae": self.sae.state_dict(), "moments": self.moments()}
        torch.save(content, folder / checkpoint_name(step))

    @torch.no_grad()
    def load(self, folder: Path, step: int) -> None:
        """Read what `save` has written."""
        content = torch.load(
            folder / checkpoint_name(step),
            map_location=self.context.setup.device,
            weights_only=True,
        )
        self.sae.load_state_dict(content["sae"])
        self.sae.refresh_copies()
        own = self.moments()
        for name, moments in content["moments"].items():
            for moment, tensor in moments.items():
                own[name][moment].copy_(tensor)
        for state in self.trainer.optimizer.state.values():
            state["step"].fill_(float(step))


class EngineRun(Run):
    """A run with DeepSpeed's engine and the trainer's checkpoints."""

    path = "deepspeed, checkpoint"

    def build(self, sae: SparseAutoencoder, config: TrainerConfig, device: torch.device) -> None:
        """Create the engine."""
        self.engine = SAEEngine("sae", sae, config, device)

    def train(self, raw: torch.Tensor, step: int) -> None:
        """Run one step."""
        self.engine.train_step(raw, step)

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return Adam's moments."""
        return self.engine.moments()

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint."""
        mesh, batch = self.sae.mesh, self.work.B
        device = self.context.setup.device
        saver = CheckpointSaver(folder, CheckpointConfig(), mesh, device, batch)
        state = CheckpointState(
            step=step,
            tokens=step * batch,
            source_position=step,
            source_identity="benchmark",
            seed=0,
            batch_tokens=batch,
            d_model=self.work.D,
            saes={self.engine.name: asdict(self.config.sae)},
            mesh={"latent": mesh.n_latent, "data": mesh.n_data, "zero_stage": 0},
        )
        saver.save(self.engine, state)
        saver.wait()

    def load(self, folder: Path, step: int) -> None:
        """Load a checkpoint."""
        load_checkpoint(folder / checkpoint_name(step), self.engine)


def run(context: Context) -> str:
    """Run every variant twice, and once with a save and a resume in the middle."""
    installed = all(find_spec(name) is not None for name in ("deepspeed", "safetensors"))
    kind: type[Run] = EngineRun if installed else PlainRun
    one_rank_mesh(context.setup.device.type)
    equal = []
    for variant in VARIANTS:
        if variant.prefilter == "float8" and context.on_cuda and not context.setup.has_float8:
            continue
        if not context.budget.left_s():
            break
        equal += [row["passed"] for row in _compare(context, kind, variant)]
    return f"{sum(equal)} of {len(equal)} comparisons equal bit for bit ({kind.path})"


def _compare(context: Context, kind: type[Run], variant: Variant) -> Iterator[Row]:
    stop = context.shapes.resumed_steps
    half = stop // 2
    first = kind(context, variant, seed=0)
    before = first.state()
    first.steps(0, stop)
    wanted = first.state()
    finite = all(bool(tensor.isfinite().all()) for tensor in wanted.values())
    moved = not torch.equal(wanted["W_enc"], before["W_enc"])
    yield _row(context, kind, variant, "equal seeds", wanted, _again(context, kind, variant))
    yield context.report(
        "training moves the weights", variant=variant.op, finite=finite, passed=finite and moved
    )
    with tempfile.TemporaryDirectory() as folder:
        saved = kind(context, variant, seed=0)
        saved.steps(0, half)
        saved.save(Path(folder), half)
        del saved
        resumed = kind(context, variant, seed=1)  # other weights, all of which must be replaced
        resumed.load(Path(folder), half)
        resumed.steps(half, stop)
        yield _row(context, kind, variant, "save and resume", wanted, resumed.state())


def _again(context: Context, kind: type[Run], variant: Variant) -> dict[str, torch.Tensor]:
    other = kind(context, variant, seed=0)
    other.steps(0, context.shapes.resumed_steps)
    return other.state()


def _row(
    context: Context,
    kind: type[Run],
    variant: Variant,
    op: str,
    wanted: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
) -> Row:
    differing = differences(wanted, found)
    return context.report(
        op,
        work=work_row(context, context.shapes.resumed),
        variant=variant.op,
        path=kind.path,
        steps=context.shapes.resumed_steps,
        differing=differing,
        passed=not differing,
    )


def differences(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the number of elements whose bits differ, for each tensor that differs.

    Args:
        wanted: Tensors by name.
        found: Tensors to compare; must have the same names and shapes.
    """
    counts = {}
    for name, tensor in wanted.items():
        ours, theirs = tensor.contiguous().view(-1), found[name].contiguous().view(-1)
        bits = (ours.view(torch.uint8) != theirs.view(torch.uint8)).view(len(ours), -1).any(1)
        if bits.any():
            counts[name] = int(bits.sum())
    return counts
