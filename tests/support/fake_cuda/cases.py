"""Parts of training that run on the fake CUDA device, at full size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from sae_core.architectures import base
from sae_core.config import (
    CheckpointConfig,
    OptimConfig,
    ParallelConfig,
    TopKConfig,
    TrainConfig,
    TrainerConfig,
)
from sae_core.distributed.mesh import Mesh
from sae_core.kernels.triton.encoder.candidates import candidates
from sae_core.training.shared_source import SharedSource
from sae_core.training.source import Batch
from sae_core.training.trainer import Trainer
from tests.support.fake_cuda.mode import CUDA, FakeDevice
from tests.support.fake_cuda.record import Record
from tests.support.fake_cuda.step_state import moved, rebind, state_of

BATCH = 32768
ANSWERS = {
    "sae_core/distributed/ranks.py: _any_failed": 0,
    "sae_core/training/trainer.py: Trainer._raise_if_bad": -1,
}
"""Answers of a healthy device; see `FakeDevice.answers`."""
WARM_UP = 3
"""Steps before the recorded one, which is captured as a CUDA graph if it can be."""


class HostSource:
    """A source whose batches are in pinned memory of the host, as a store gives them."""

    identity = "host"

    def __init__(self, n_rows: int, d_model: int, pinned: bool = True) -> None:
        self.d_in = self.d_out = d_model
        self.position = 0
        self._x = torch.empty(n_rows, d_model, dtype=torch.bfloat16, pin_memory=pinned)

    def sample(self, n: int) -> torch.Tensor:
        """Return [n, D] rows in ordinary memory."""
        return torch.empty(n, self.d_in, dtype=torch.bfloat16)

    def seek(self, position: int) -> None:
        """Make `position` the next batch."""
        self.position = position

    def next(self) -> Batch:
        """Return the batch, which is always in the same memory."""
        self.position += 1
        return Batch(self._x, None, 0)


@contextmanager
def ranks(device: FakeDevice, latent: int = 1, data: int = 1, rank: int = 0) -> Iterator[Mesh]:
    """Be one rank of a mesh on the fake device; the other ranks do not exist."""
    size = latent * data
    with device:
        dist.init_process_group("nccl", store=HashStore(), rank=rank, world_size=size)
        try:
            yield Mesh.create("cuda", latent, data)
        finally:
            dist.destroy_process_group()
            _forget_groups()


def _forget_groups() -> None:
    """Drop the process groups that DeepSpeed keeps in global variables."""
    import deepspeed.comm.comm
    from deepspeed.utils import groups

    deepspeed.comm.comm.cdb = None
    for name, value in vars(groups).items():
        if name.startswith("_") and isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)


@contextmanager
def _device_dictionary() -> Iterator[None]:
    """Create initial dictionaries on the device, because the host would need minutes."""

    def rows(start: int, stop: int, d_model: int, seed: int) -> torch.Tensor:
        return torch.empty(stop - start, d_model, device=CUDA)

    with patch.object(base, "random_unit_rows", rows):
        yield


def make_config(
    sae: Mapping[str, Any],
    optim: Mapping[str, Any],
    train: Mapping[str, Any],
    latent: int = 1,
    data: int = 1,
) -> TrainerConfig:
    """Return the default configuration of a CUDA run, with these settings changed."""
    settings = {"tokens": 100 * BATCH, "batch_tokens": BATCH, **train}
    return TrainerConfig(
        TopKConfig(**{"n_latents": 131072, "k": 64, "hookpoint": "sae", **sae}),
        OptimConfig(**{"lr": 1e-4, **optim}),
        TrainConfig(**settings),
        ParallelConfig(latent=latent, data=data),
        CheckpointConfig(),
    )


def make_trainer(
    mesh: Mesh,
    config: TrainerConfig,
    d_model: int,
    folder: Path,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Trainer:
    """Build a trainer whose batches are uploaded from pinned memory."""
    source = HostSource(config.train.batch_tokens // mesh.n_data, d_model)
    shared = SharedSource(source, torch.device("cuda"))
    with _device_dictionary():
        return Trainer(config, mesh, shared.view(), folder, 0, report, 10**9)


def step(
    device: FakeDevice,
    folder: str,
    d_model: int = 4096,
    latent: int = 1,
    data: int = 1,
    rank: int = 0,
    sae: Mapping[str, Any] = {},
    optim: Mapping[str, Any] = {},
    train: Mapping[str, Any] = {},
    few: int | None = None,
    answers: Mapping[str, int] = {},
) -> Record:
    """Return the record of one training step, with its batch and its metrics.

    Args:
        device: The fake device.
        folder: Folder of checkpoints.
        d_model: D.
        latent: Number of latent shards.
        data: Number of replicas.
        rank: This process's rank.
        sae: Changed settings of the SAE.
        optim: Changed settings of the optimiser.
        train: Changed settings of training.
        few: Index of the encoder's candidate, as if it had been the fastest.
        answers: What the device answers where the host asks it; see `FakeDevice.answers`.
    """
    config = make_config(sae, optim, train, latent, data)
    device.answers = ANSWERS | dict(answers)
    with ranks(device, latent, data, rank) as mesh:
        trainer = make_trainer(mesh, config, d_model, Path(folder))
        if few is not None:
            choose_candidate(trainer, few)
        for _ in range(WARM_UP):
            trainer.take_step()
        device.clear()
        trainer.take_step()
        return device.clear()


def choose_candidate(trainer: Trainer, few: int) -> None:
    """Use one of the encoder's candidates; there are no times by which to choose."""
    kernels: Any = trainer.engine.sae.kernels
    name = "_encoder" if kernels.prefilter is None else "_float8_encoder"
    encoder = getattr(kernels, name)
    chosen = candidates(encoder.dtype, encoder.precision)[few]
    setattr(kernels, name, encoder.with_few(chosen))


def graph(
    device: FakeDevice, folder: str, rebound: str = "", sae: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Run a default step eagerly, capture it as a CUDA graph, and replay it twice.

    Args:
        device: The fake device.
        folder: Folder of checkpoints.
        rebound: Name of a tensor that every step puts into other memory; see `state_of`.
        sae: Changed settings of the SAE.

    Returns:
        `steps`: records of the steps from the last eager one on; `state`: names of the tensors
        that are kept between two steps; `moved`: those that a step did not update in place.
    """
    device.answers = ANSWERS
    with ranks(device) as mesh:
        trainer = make_trainer(mesh, make_config(sae, {}, {}), 4096, Path(folder))
        engine = trainer.engine
        if rebound:
            last_part: Any = engine.sae
            own = last_part.update_tokens_since_fired

            def careless(*arguments: Any) -> None:
                own(*arguments)
                rebind(engine, rebound)

            last_part.update_tokens_since_fired = careless
        for _ in range(WARM_UP - 1):
            trainer.take_step()
        before = state_of(engine)
        steps = []
        for _ in range(4):
            device.clear()
            trainer.take_step()
            steps.append(device.clear())
        after = state_of(engine)
        return {"steps": steps, "state": set(after), "moved": moved(before, after)}
