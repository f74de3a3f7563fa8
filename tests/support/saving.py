"""A rank that trains the tests' small SAE and fails at a chosen point of a chosen save."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sae_core.checkpoint import host_copy, newest_valid
from tests.support.trainer_ranks import BATCH, Job, SyntheticSource, config_of

STEPS, EVERY, FAILURE_STEP = 40, 10, 20


@dataclass(frozen=True)
class Failure:
    """A failure of rank `rank` in the save of step `step`."""

    point: str
    how: str = "kill"
    """`kill`, `raise` or `wait`."""
    rank: int = 0
    step: int = FAILURE_STEP


def train(
    folder: str,
    latent: int = 2,
    zero: int = 0,
    failure: Failure | None = None,
    checkpoint: dict[str, Any] | None = None,
    step_s: float = 0.0,
    short_of_memory: bool = False,
) -> int:
    """Run one rank: resume, train and return 0. Every batch takes at least `step_s` seconds.

    If `short_of_memory`, the host has no memory for copies, and blocks have 1,000 bytes.
    """
    import torch.distributed as dist

    from sae_core.distributed.mesh import Mesh
    from sae_core.training.lockstep import train_to_end
    from sae_core.training.trainer import Trainer

    torch.set_num_threads(1)
    if short_of_memory:
        patched: Any = host_copy
        patched.BLOCK_BYTES, patched.available_bytes = 1000, lambda: 0
    dist.init_process_group("gloo")
    mesh = Mesh.create("cpu", latent, dist.get_world_size() // latent)
    root = Path(folder) / "checkpoints"
    root.mkdir(exist_ok=True)
    job = Job(folder, latent, mesh.n_data, zero, steps=STEPS, save_every=EVERY)
    config = config_of(job)
    config.checkpoint = replace(config.checkpoint, **(checkpoint or {}))
    if failure is not None and failure.rank == dist.get_rank():
        install_failure(failure)
    source = _Slow(mesh.data_rank, mesh.n_data, step_s)
    rows: list[dict[str, Any]] = []
    trainer = Trainer(config, mesh, source, root, 3, rows.append, 5)
    newest = newest_valid(root)
    dist.barrier()
    if newest is None:
        trainer.calibrate()
    else:
        trainer.resume(newest)
        print(f"resumed from {newest.name}", flush=True)
    try:
        train_to_end(trainer)
    finally:
        print(f"ended at step {trainer.step}", flush=True)
    print(f"costs {trainer.costs}, pauses {[row['checkpoint_pause_s'] for row in rows]}")
    dist.barrier()
    dist.destroy_process_group()
    return 0


class _Slow(SyntheticSource):
    def __init__(self, replica: int, n_replicas: int, step_s: float) -> None:
        super().__init__(replica, n_replicas)
        self._step_s = step_s

    def next(self) -> Any:
        time.sleep(self._step_s)
        return super().next()


def install_failure(failure: Failure) -> None:
    """Install the failure at `failure.point` of the save of step `failure.step`."""
    from sae_core.checkpoint import background_saver, save
    from sae_core.checkpoint.safetensors_file import TensorFileWriter

    def fail() -> None:
        if failure.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if failure.how == "wait":
            time.sleep(1)
            return
        raise OSError(28, "No space left on device (injected by a test)")

    def is_target(*arguments: Any) -> bool:
        return any(f"step-{failure.step:08d}" in str(a) for a in arguments)

    def before(owner: Any, name: str, only: Callable[..., bool] = is_target) -> None:
        real = getattr(owner, name)

        def trapped(*arguments: Any, **more: Any) -> Any:
            if only(*arguments):
                fail()
            return real(*arguments, **more)

        setattr(owner, name, trapped)

    if failure.point == "copy":
        saver: Any = background_saver.CheckpointSaver
        trainer_save = saver.save

        def trapped_save(self: Any, engines: Any, state: Any) -> None:
            if state.step == failure.step:
                self.wait()  # or the kill could hit the previous save as well
                fail()
            trainer_save(self, engines, state)

        saver.save = trapped_save
    elif failure.point == "write":
        before(save, "_write_tensors", lambda folder, *_: is_target(folder) and _torn(folder))
    elif failure.point == "begin":
        before(save, "_write")
    elif failure.point == "disk":
        before(TensorFileWriter, "write_bytes", lambda self, *_: is_target(self.path))
    elif failure.point == "no room":
        _limit_file_size(save, is_target)
    elif failure.point == "manifest":
        before(save, "_publish")
    elif failure.point == "rename":
        before(os, "rename")
    elif failure.point == "latest":
        before(save, "write_json", lambda path, value: path.name == "latest" and is_target(value))
    elif failure.point == "prune":
        before(shutil, "rmtree", lambda path, *_: ".old" in Path(path).name)
    else:
        raise ValueError(failure.point)


def _torn(folder: Path) -> bool:
    """Begin a file of the optimizer part of an unfinished checkpoint, and return True."""
    (folder / "optimizer" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"x" * 1000)
    return True


def _limit_file_size(save: Any, is_target: Callable[..., bool]) -> None:
    """Limit the files that this process may write during the save to 4 KiB."""
    real = save._write_tensors

    def limited(folder: Path, *more: Any) -> Any:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if is_target(folder):
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            return real(folder, *more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    save._write_tensors = limited


TOKENS_PER_SAVE = EVERY * BATCH
