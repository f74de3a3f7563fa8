"""The training loop: next batch, step every SAE, measure, save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from sae_core.architectures import build_sae
from sae_core.checkpoint import load_checkpoint, save_checkpoint
from sae_core.config import TrainerConfig
from sae_core.engine import SAEEngine
from sae_core.errors import ConfigError, NonFiniteLossError
from sae_core.initialise import calibrate
from sae_core.kernels import get_kernels
from sae_core.mesh import Mesh
from sae_core.metrics import StepMetrics, mfu, peak_memory_bytes
from sae_core.source import ActivationSource


class Report(Protocol):
    """Takes one metrics row (see `Trainer`); called on every rank, with the same row."""

    def __call__(self, row: dict[str, Any]) -> None: ...


class Trainer:
    """Trains one SAE or several from one stream.

    Args:
        config: everything about the SAE, its optimiser, mesh and checkpoints.
        mesh: this rank's place.
        source: this data replica's batches.
        checkpoints: folder of the run's checkpoints.
        seed: fixes the initial dictionary.
        report: gets a row of metrics every `report_every` steps: step, tokens, sae, loss, fvu,
            auxk_loss, l0, dead_fraction, grad_norm, lr, tokens_per_s, loader_wait_fraction, mfu,
            peak_memory_bytes.
        report_every: steps.

    Raises:
        ConfigError: the config cannot be, or the device has no such dtype.
    """

    def __init__(
        self,
        config: TrainerConfig,
        mesh: Mesh,
        source: ActivationSource,
        checkpoints: Path,
        seed: int,
        report: Report,
        report_every: int,
    ) -> None:
        config.validate()
        self.config, self.mesh, self.source = config, mesh, source
        self.checkpoints, self.seed = checkpoints, seed
        self.report, self.report_every = report, report_every
        self.device = torch.device(mesh.devices.device_type)
        kernels = get_kernels(
            kernels_name(config.train.kernels, self.device),
            compute_dtype(config.train.compute_dtype, self.device),
            tf32=config.train.compute_dtype == "tf32",
            prefilter=config.train.prefilter,
        )
        sae = build_sae(config.sae, source.d_in, mesh, kernels, seed).to(self.device)
        self.engines = [SAEEngine(config.sae.hookpoint or "sae", sae, config, self.device)]
        self.step = 0
        self._clock = _Clock()

    def calibrate(self) -> None:
        """Fits input scale, bias and encoder scale to a sample; a fresh run's first act."""
        sample = self.source.sample(self.config.train.sample_tokens).to(self.device)
        for engine in self.engines:
            calibrate(engine.sae, sample)
            engine.parameters_edited()

    def resume(self, folder: Path) -> None:
        """Continues from a checkpoint, written on this mesh or another; collective."""
        state = load_checkpoint(folder, self.engines)
        if state.batch_tokens != self.config.train.batch_tokens:
            raise ConfigError(
                "train.batch_tokens",
                self.config.train.batch_tokens,
                f"{state.batch_tokens}, as the checkpoint's position counts batches of that size",
            )
        if state.source_identity != self.source.identity:
            raise ConfigError(
                "store.path",
                self.source.identity,
                f"the store that {folder.name} was trained on, {state.source_identity}",
                "use that store, or another name=...",
            )
        self.step = state.step
        self.source.seek(state.source_position)

    def train(self) -> None:
        """Runs to the last step, saving on the way and at the end; collective.

        Raises:
            NonFiniteLossError: naming the step; no update was made from it on any rank.
            CheckpointError: a checkpoint could not be written.
        """
        metrics = [StepMetrics(engine) for engine in self.engines]
        save_every = max(1, self.config.checkpoint.every_tokens // self.config.train.batch_tokens)
        self._clock.start()
        while self.step < self.config.train.n_steps:
            self._train_step(metrics)
            last = self.step == self.config.train.n_steps
            if self.step % self.report_every == 0 or last:
                self._report(metrics)
            if self.step % save_every == 0 or last:
                self.save()

    def save(self) -> Path:
        """Checkpoints all SAEs; collective."""
        self._raise_if_bad()
        return save_checkpoint(
            self.checkpoints,
            self.engines,
            self.step,
            self.source,
            self.seed,
            self.config.checkpoint.keep,
        )

    def _train_step(self, metrics: list[StepMetrics]) -> None:
        with self._clock.waiting():
            batch = self.source.next()
        raw = batch.x.to(self.device, non_blocking=True)
        for engine, metric in zip(self.engines, metrics, strict=True):
            metric.add(raw, engine.train_step(raw, self.step))
        self.step += 1

    def _report(self, metrics: list[StepMetrics]) -> None:
        self._raise_if_bad()
        seconds, waited, steps = self._clock.lap()
        tokens_per_s = steps * self.config.train.batch_tokens / seconds
        for engine, metric in zip(self.engines, metrics, strict=True):
            self.report(
                {
                    "time": time.time(),
                    "step": self.step,
                    "tokens": self.step * self.config.train.batch_tokens,
                    "sae": engine.name,
                    **metric.reduce(),
                    "tokens_per_s": tokens_per_s,
                    "loader_wait_fraction": waited / seconds,
                    "mfu": mfu(
                        tokens_per_s,
                        self.source.d_in,
                        self.config.sae.n_latents,
                        self.config.parallel.n_ranks,
                    ),
                    "peak_memory_bytes": peak_memory_bytes(),
                }
            )

    def _raise_if_bad(self) -> None:
        for engine in self.engines:
            step = int(engine.first_bad_step)
            if step >= 0:
                raise NonFiniteLossError(
                    f"{engine.name}: loss or gradient of step {step} is not finite; no update was "
                    "made from it. Check the store with stage=verify, or lower optim.lr; the same "
                    "command resumes from the last checkpoint"
                )


class _Clock:
    """Wall time, time spent waiting for data and steps taken, since the last lap."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._began, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as waiting, and as the beginning of one step."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    def lap(self) -> tuple[float, float, int]:
        """(seconds, seconds waited, steps) since the last lap."""
        lap = (max(time.perf_counter() - self._began, 1e-9), self._waited, self._steps)
        self.start()
        return lap


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """GEMM dtype of `train.compute_dtype` on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def kernels_name(name: str, device: torch.device) -> str:
    """Body of `train.kernels` on a device."""
    if name == "auto":
        return "triton" if device.type == "cuda" else "stock"
    return name
