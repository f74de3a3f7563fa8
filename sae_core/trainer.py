"""What one run does in a training step: next batch, step every SAE, measure, save.

The loop itself, over one trainer or several, stands in `sae_core.together`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from sae_core.architectures import build_sae
from sae_core.checkpoint import CheckpointSaver, CheckpointState, load_checkpoint
from sae_core.config import TrainerConfig
from sae_core.engine import SAEEngine
from sae_core.errors import CheckpointError, ConfigError, NonFiniteLossError
from sae_core.initialise import calibrate
from sae_core.kernels import get_kernels
from sae_core.mesh import Mesh
from sae_core.metrics import StepMetrics, mfu, peak_memory_bytes
from sae_core.source import ActivationSource
from sae_core.together import train_together


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
        report: gets a row of metrics every `report_every` steps, on every rank; an SAEError that it
            raises on all of them ends this trainer. Holds step, tokens, sae, loss, fvu, auxk_loss,
            l0, dead_fraction, grad_norm, lr, tokens_per_s, loader_wait_fraction,
            checkpoint_pause_s (since the row before), mfu, peak_memory_bytes.
        report_every: steps.
        stop_requested: asked about once a second on every rank; True on any ends training with a
            checkpoint.

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
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        config.validate()
        self.config, self.mesh, self.source = config, mesh, source
        self.seed, self.stop_requested = seed, stop_requested
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
        self.saver = CheckpointSaver(
            checkpoints, config.checkpoint, mesh, self.device, config.train.batch_tokens
        )
        self._metrics = [StepMetrics(engine) for engine in self.engines]
        self._clock = _Clock()
        self._began: float | None = None
        self._seconds = 0.0

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
        if state.seed != self.seed:
            raise ConfigError(
                "seed", self.seed, f"{state.seed}, which fixed the order that {folder.name} is in"
            )
        if state.source_identity != self.source.identity:
            raise ConfigError(
                "store.path",
                self.source.identity,
                f"the stores, their weights and the order (store.window_items, "
                f"store.buffer_tokens) that "
                f"{folder.name} was trained on, {state.source_identity}",
                "use that store and those settings, or another name=...",
            )
        self.step = state.step
        self.source.seek(state.source_position)

    def train(self) -> bool:
        """Runs to the last step, saving on the way and at the end; collective.

        Returns:
            False where a request ended it before the last step; the checkpoint is written.

        Raises:
            NonFiniteLossError: naming the step; no update was made from it on any rank.
            CheckpointError: a checkpoint could not be written.
        """
        (outcome,) = train_together([self])
        if outcome.error is not None:
            raise outcome.error
        return outcome.finished

    @property
    def is_done(self) -> bool:
        """Whether the last step is taken."""
        return self.step >= self.config.train.n_steps

    def take_step(self) -> None:
        """The next batch, and a metrics row where one is due; collective. See `train_together`.

        Raises:
            NonFiniteLossError: found when metrics are reported.
        """
        if self._began is None:
            self._began = time.perf_counter()
            self._clock.start()
        self._train_step()
        if self.step % self.report_every == 0 or self.is_done:
            self._report()

    def save_if_due(self, asked: bool) -> None:
        """Begins a checkpoint after a step where the cadence, the end or somebody asks for one."""
        every = max(1, self.config.checkpoint.every_tokens // self.config.train.batch_tokens)
        if self.step % every == 0 or self.is_done or asked:
            self.save()

    @property
    def save_overdue(self) -> bool:
        """By the clock of the first rank, which speaks for all."""
        minutes = self.config.checkpoint.every_minutes
        since_save_s = time.monotonic() - self.saver.last_began
        return minutes is not None and self.mesh.is_first and since_save_s > 60 * minutes

    def end(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            CheckpointError: it could not be written.
        """
        self.saver.wait()
        self._seconds = time.perf_counter() - (self._began or time.perf_counter())

    @property
    def costs(self) -> dict[str, float]:
        """Of `train`, on this rank: seconds in all, checkpoints, seconds that it waited for them
        (copies, back-pressure, the last one), seconds that writing them took.
        """
        return {
            "seconds": self._seconds,
            "checkpoints": self.saver.saves,
            "checkpoint_pause_s": self.saver.pause_s,
            "checkpoint_writing_s": self.saver.writing_s,
        }

    def save(self) -> None:
        """Begins a checkpoint of all SAEs; collective. `saver.wait()` returns when it is there."""
        self._raise_if_bad()
        first, batch_tokens = self.engines[0], self.config.train.batch_tokens
        paused = self.saver.pause_s
        state = CheckpointState(
            step=self.step,
            tokens=self.step * batch_tokens,
            source_position=self.source.position,
            source_identity=self.source.identity,
            seed=self.seed,
            batch_tokens=batch_tokens,
            d_model=first.sae.b_dec.shape[0],
            saes={engine.name: asdict(engine.sae.config) for engine in self.engines},
            mesh=asdict(self.config.parallel),
        )
        self.saver.save(self.engines, state)
        self._clock.pause(self.saver.pause_s - paused)

    def _train_step(self) -> None:
        with self._clock.waiting():
            batch = self.source.next()
        raw = batch.x.to(self.device, non_blocking=True)
        for engine, metric in zip(self.engines, self._metrics, strict=True):
            metric.add(raw, engine.train_step(raw, self.step))
        self.step += 1

    def _report(self) -> None:
        self._raise_if_bad()
        seconds, waited, paused, steps = self._clock.lap()
        tokens_per_s = steps * self.config.train.batch_tokens / seconds
        for engine, metric in zip(self.engines, self._metrics, strict=True):
            self.report(
                {
                    "time": time.time(),
                    "step": self.step,
                    "tokens": self.step * self.config.train.batch_tokens,
                    "sae": engine.name,
                    **metric.reduce(),
                    "tokens_per_s": tokens_per_s,
                    "loader_wait_fraction": waited / seconds,
                    "checkpoint_pause_s": paused,
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
                failed: CheckpointError | None = None
                try:
                    self.saver.wait()  # what it writes was good
                except CheckpointError as error:
                    failed = error
                raise NonFiniteLossError(
                    f"{engine.name}: loss or gradient of step {step} is not finite; no update was "
                    "made from it. Check the store with stage=verify, or lower optim.lr; the same "
                    "command resumes from the last checkpoint"
                ) from failed


class _Clock:
    """Wall time, time spent waiting for data and for checkpoints, steps; since the last lap."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._began, self._waited, self._paused, self._steps = time.perf_counter(), 0.0, 0.0, 0

    def pause(self, seconds: float) -> None:
        """Counts time that a checkpoint took."""
        self._paused += seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as waiting, and as the beginning of one step."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    def lap(self) -> tuple[float, float, float, int]:
        """(seconds, waited for data, paused for checkpoints, steps) since the last lap."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        lap = (seconds, self._waited, self._paused, self._steps)
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
