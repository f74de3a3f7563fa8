"""Start real gloo ranks for the distributed tests, with synthetic activations and a small SAE."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sae_core.architectures.registry import ARCHITECTURES
from sae_core.config import (
    CheckpointConfig,
    OptimConfig,
    ParallelConfig,
    SAEConfig,
    TopKConfig,
    TrainConfig,
    TrainerConfig,
)
from sae_core.training.source import Batch
from tests.support.ranks import Ranks
from tests.support.toys.architecture import registered_toys

D, N_LATENTS, BATCH, STEPS = 24, 250, 48, 50


class SyntheticSource:
    """A source of sparse sums of fixed directions; batch i is a pure function of i.

    Args:
        replica: Index of the replica, which receives one of `n_replicas` equal parts of each batch.
        n_replicas: Number of replicas.
        poison: Index of the batch whose first value is NaN; None for no such batch.
    """

    d_in = d_out = D
    identity = "synthetic"

    def __init__(self, replica: int, n_replicas: int, poison: int | None = None) -> None:
        self.position = 0
        self.replica = replica
        self.n_replicas = n_replicas
        self.poison = poison
        self.directions = torch.randn(96, D, generator=torch.Generator().manual_seed(7))

    def rows(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + index)
        weights = torch.rand(BATCH, 96, generator=generator)
        on = torch.rand(BATCH, 96, generator=generator) < 0.06
        noise = 0.02 * torch.randn(BATCH, D, generator=generator)
        return (weights * on) @ self.directions * 3 + 1.5 + noise

    def sample(self, n: int) -> torch.Tensor:
        return torch.cat([self.rows(i) for i in range(-(-n // BATCH))])[:n]

    def seek(self, position: int) -> None:
        self.position = position

    def next(self) -> Batch:
        x = self.rows(self.position).chunk(self.n_replicas)[self.replica].clone()
        if self.position == self.poison:
            x[0, 0] = float("nan")
        self.position += 1
        return Batch(x, None, 0)


@dataclass
class Job:
    """The job of a group of ranks."""

    folder: str
    latent: int = 1
    data: int = 1
    zero_stage: int = 0
    update: str = "auto"
    resume: str | None = None
    """Checkpoint to resume from, or "newest" for the newest that the ranks agree on, or None."""
    steps: int = STEPS
    save_every: int = 25
    breakage: str | None = None
    """Feature to disable, so that a test can show that its comparison then fails."""
    clip_norm: float = 0.3
    kernels: str = "stock"
    poison_gradient_step: int | None = None
    """Step whose gradient, but not loss, is made infinite on rank `poison_rank`."""
    poison_loss_step: int | None = None
    """Step whose loss, but not gradient, is made infinite on rank `poison_rank`."""
    poison_step: int | None = None
    """Step whose batch contains NaN on rank `poison_rank`."""
    poison_rank: int = 0
    architecture: str = "topk"
    """Registered name, or toy (see `tests.support.toys.architecture`)."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values to set in the SAE's config."""
    moments: str = "float32"
    prefilter: str = "auto"
    init_from: str | None = None


def config_of(job: Job) -> TrainerConfig:
    """Return the trainer's config of a job."""
    sae: SAEConfig = TopKConfig(n_latents=N_LATENTS, k=6, auxk=8, dead_after_tokens=8 * BATCH)
    if job.architecture != "topk":
        settings = ARCHITECTURES[job.architecture].settings
        sae = settings(n_latents=N_LATENTS, dead_after_tokens=8 * BATCH)
    for key, value in job.overrides.items():
        setattr(sae, key, value)
    return TrainerConfig(
        sae,
        OptimConfig(
            lr=3e-3,
            warmup_tokens=8 * BATCH,
            decay_tokens=min(10, job.steps - 8) * BATCH,
            clip_norm=job.clip_norm,
            update=job.update,
            moments=job.moments,
        ),
        TrainConfig(
            job.steps * BATCH,
            BATCH,
            sample_tokens=480,
            init_from=job.init_from,
            kernels=job.kernels,
            prefilter=job.prefilter if job.kernels == "stock" else "auto",
        ),
        ParallelConfig(job.latent, job.data, job.zero_stage),
        CheckpointConfig(every_tokens=job.save_every * BATCH),
    )


def run_job(job: Job, timeout_s: float = 120) -> list[dict[str, Any]]:
    """Run the job's ranks until they end; return the metric rows of rank 0.

    Raises:
        RanksFailed: If a rank ends with an error; the message has the output of all ranks.
    """
    ranks = Ranks(Path(job.folder), job.latent * job.data, _rank_main, job)
    if any(ranks.codes(timeout_s)):
        raise RanksFailed("\n".join(ranks.logs()))
    return json.loads((Path(job.folder) / "rows.json").read_text())


class RanksFailed(Exception):
    """At least one rank ended with an error."""


def _rank_main(job: Job) -> int:
    with registered_toys():
        return _train(job)


def _train(job: Job) -> int:
    import torch.distributed as dist

    from sae_core.checkpoint import agreed_checkpoint
    from sae_core.distributed.mesh import Mesh
    from sae_core.training.lockstep import train_to_end
    from sae_core.training.trainer import Trainer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = Mesh.create("cpu", job.latent, job.data)
    poison = job.poison_step if dist.get_rank() == job.poison_rank else None
    source = SyntheticSource(mesh.data_rank, mesh.n_data, poison)
    rows: list[dict[str, Any]] = []
    checkpoints = Path(job.folder) / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    _disable(job.breakage)
    trainer = Trainer(config_of(job), mesh, source, checkpoints, 3, rows.append, 1)
    if dist.get_rank() == job.poison_rank:
        _poison_gradient(trainer, job)
    bad_steps = (job.poison_gradient_step, job.poison_loss_step, job.poison_step)
    for step in filter(None, bad_steps):
        _compare_around(trainer, step)
    if job.resume is None:
        trainer.calibrate()
    else:
        chosen = agreed_checkpoint(checkpoints) if job.resume == "newest" else Path(job.resume)
        assert chosen is not None
        trainer.resume(chosen)
        if job.steps == trainer.step:  # no step left: save the loaded state again
            trainer.save()
    train_to_end(trainer)
    if trainer.engine.fused:
        sae = trainer.engine.sae
        assert all(p.grad is None for p in (sae.W_enc, sae.W_dec, sae.b_enc)), "dense gradient"
    if dist.get_rank() == 0:
        (Path(job.folder) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _disable(feature: str | None) -> None:
    """Disable one feature on purpose."""
    import torch.distributed as dist

    from sae_core.architectures import base, sparse_autoencode
    from sae_core.architectures.topk.training import TopKSAE
    from sae_core.engine import fused_adam
    from sae_core.engine.deepspeed_engine import SAEEngine

    without_all_reduce = _Without(dist, "all_reduce")
    patches: dict[str, tuple[Any, str, Any]] = {
        "global selection": (
            sparse_autoencode,
            "select_global",
            lambda values, *_: values > float("-inf"),
        ),
        "reconstruction all-reduce": (sparse_autoencode, "dist", without_all_reduce),
        "fired all-reduce": (base, "dist", without_all_reduce),
        "gradient average": (SAEEngine, "train_step", _without_average(SAEEngine.train_step)),
        "sharded mark": (TopKSAE, "forward", _without_mark(TopKSAE.forward)),
        "replica exchange": (fused_adam, "gather_over_replicas", lambda gradient, *_: gradient),
        "zero push": (SAEEngine, "_push_to_zero", lambda *_: None),
    }
    if feature is not None:
        owner, name, replacement = patches[feature]
        assert hasattr(owner, name)
        setattr(owner, name, replacement)


def _without_average(train_step: Any) -> Any:
    def broken(self: Any, *arguments: Any) -> Any:
        self.engine.enable_backward_allreduce = False
        return train_step(self, *arguments)

    return broken


def _without_mark(forward: Any) -> Any:
    def broken(self: Any, raw: torch.Tensor) -> Any:
        for parameter in (self.W_enc, self.W_dec, self.b_enc):
            parameter.tensor_model_parallel = False
        return forward(self, raw)

    return broken


def _poison_gradient(trainer: Any, job: Job) -> None:
    """Make the gradient or the loss of a step infinite, as an overflow in either would."""
    engine = trainer.engine
    train_step, forward = engine.train_step, engine.sae.forward

    def poisoned(raw: torch.Tensor, step: int) -> Any:
        handle = None
        if step == job.poison_gradient_step:
            handle = engine.sae.b_dec.register_hook(lambda grad: grad * float("inf"))
        if step == job.poison_loss_step:
            engine.sae.forward = infinite
        out = train_step(raw, step)
        engine.sae.forward = forward
        if handle is not None:
            handle.remove()
        return out

    def infinite(raw: torch.Tensor) -> Any:
        out = forward(raw)
        return out._replace(loss=out.loss + float("inf"))

    engine.train_step = poisoned


def _compare_around(trainer: Any, bad_step: int) -> None:
    """Print whether step `bad_step` changed weights, ages or moments."""
    engine = trainer.engine
    train_step = engine.train_step

    def state() -> list[torch.Tensor]:
        moments = [m for named in engine.moments().values() for m in named.values()]
        return [t.clone() for t in [*engine.sae.state_dict().values(), *moments]]

    def compared(raw: torch.Tensor, step: int) -> Any:
        before = state() if step == bad_step else []
        out = train_step(raw, step)
        if before:
            same = all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
            print(f"step {step} {'changed nothing' if same else 'changed something'}", flush=True)
        return out

    engine.train_step = compared


class _Without:
    """A wrapper of a module in which one function does nothing."""

    def __init__(self, module: Any, name: str) -> None:
        self._module = module
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return (lambda *_, **__: None) if name == self._name else getattr(self._module, name)
