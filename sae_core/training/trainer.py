"""The trainer: its training step, metrics, checkpoints and resume.

The training loop, over one trainer or several, is in `sae_core.training.lockstep`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from foundation.errors import ConfigError
from sae_core.architectures.registry import build_sae
from sae_core.checkpoint import CheckpointSaver, CheckpointState, load_checkpoint
from sae_core.config import TrainerConfig
from sae_core.distributed.mesh import Mesh
from sae_core.distributed.ranks import is_rank_zero
from sae_core.engine.deepspeed_engine import SAEEngine
from sae_core.errors import CheckpointError, NonFiniteLossError
from sae_core.kernels.interface import Prepared
from sae_core.kernels.prefilter_choice import PrefilterChoice, candidates
from sae_core.kernels.registry import KERNELS, default_kernels, get_kernels
from sae_core.training.calibrate import calibrate
from sae_core.training.initial_weights import start_from
from sae_core.training.input_transform import InputReport, report_of
from sae_core.training.prefilter import agree_on_prefilter
from sae_core.training.source import ActivationSource
from sae_core.training.step_metrics import StepMetrics, mfu, peak_memory_bytes


class Report(Protocol):
    """Function that takes rows of metrics; see `Trainer`."""

    def __call__(self, row: dict[str, Any], /) -> None:
        """Take one row; called on every rank, with the same row."""
        ...


class Trainer:
    """Trains an SAE on a stream of activations.

    Args:
        config: Settings of the SAE, its optimiser, the mesh and checkpoints.
        mesh: This rank's place in the mesh.
        source: Batches of this data replica on this rank's device: a view of a `SharedSource`,
            which moves them there.
        checkpoints: Folder of the run's checkpoints.
        seed: Seed of the initial dictionary.
        report: Called on every rank with a row of metrics every `report_every` steps. It may end
            this trainer by raising an SAEError, which it must do on all ranks. Keys: time, step,
            tokens, sae, the metrics of `sae_core.training_metrics` and of the architecture,
            tokens_per_s, loader_wait_fraction, checkpoint_pause_s (since the last row), mfu,
            peak_memory_bytes.
        report_every: Number of steps between two rows.
        stop_requested: Called about once a second on every rank. If it returns True on any rank,
            training ends with a checkpoint.

    Raises:
        ConfigError: If the config is invalid, or the device does not support its kernels or dtype.
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
        train = config.train
        sae_config = config.sae.resolved(source.d_in, train.batch_tokens, train.tokens)
        config = replace(config, sae=sae_config)
        self.config = config
        self.mesh = mesh
        self.source = source
        self.seed = seed
        self.stop_requested = stop_requested
        self.report = report
        self.report_every = report_every
        self.device = torch.device(mesh.devices.device_type)
        name = config.train.kernels
        if name == "auto":
            name = default_kernels(self.device.type)
        dtype = compute_dtype(config.train.compute_dtype, self.device)
        config.train.validate_prefilter(self.device.type)  # it may have been auto until now
        prefilter = config.train.prefilter
        kernels = get_kernels(
            name,
            dtype,
            tf32=config.train.compute_dtype == "tf32",
            prefilter="none" if prefilter == "auto" else prefilter,
        )
        sae = build_sae(config.sae, source.d_in, mesh, kernels, seed).to(self.device)
        self.engine = SAEEngine(config.sae.hookpoint or "sae", sae, config, self.device)
        self.step = 0
        self._prefilters = candidates(
            KERNELS[name], self.device.type, str(dtype).removeprefix("torch.")
        )
        self.prefilter: PrefilterChoice | None = None
        """The choice of `train.prefilter=auto`, set by `calibrate` or `resume`, else None."""
        self.saver = CheckpointSaver(
            checkpoints, config.checkpoint, mesh, self.device, config.train.batch_tokens
        )
        self.inputs: InputReport | None = None
        """How the channels of the calibration sample differ; None on ranks other than 0, and if the
        run was resumed."""
        self._metrics = StepMetrics(self.engine)
        self._clock = _Clock()
        self._began: float | None = None
        self._seconds = 0.0

    def calibrate(self) -> None:
        """Fit input scale, bias and encoder to a sample, and choose the prefilter; collective.

        With `train.init_from`, bias and dictionary are those of another SAE.

        Call once, before a new run.
        """
        sample = self.source.sample(self.config.train.sample_tokens)
        calibrate(self.engine.sae, sample)
        init_from = self.config.train.init_from
        if init_from is not None:
            start_from(self.engine.sae, init_from)
        self.inputs = report_of(sample) if is_rank_zero() else None
        self.engine.sync_edited_parameters()
        self._choose_prefilter(None)

    def resume(self, folder: Path) -> None:
        """Load a checkpoint written on this mesh or any other; collective over all ranks.

        The prefilter that `train.prefilter=auto` chose is kept where possible; see
        `agree_on_prefilter`.

        Raises:
            ConfigError: If batch size, seed or source differ from those of the checkpoint.
            CheckpointError: If the checkpoint holds another SAE or is damaged.
        """
        state = load_checkpoint(folder, self.engine)
        if state.batch_tokens != self.config.train.batch_tokens:
            raise ConfigError(
                "train.batch_tokens",
                self.config.train.batch_tokens,
                f"{state.batch_tokens}, the batch size in which the checkpoint counts its position",
            )
        if state.seed != self.seed:
            raise ConfigError(
                "seed", self.seed, f"{state.seed}, the seed with which {folder.name} was trained"
            )
        if state.source_identity != self.source.identity:
            raise ConfigError(
                "store.path",
                self.source.identity,
                f"the stores, weights and order (store.window_items, store.buffer_tokens) that "
                f"{folder.name} was trained on, {state.source_identity}",
                "use those stores and settings, or start a new run with another name=...",
            )
        self.step = state.step
        self.source.seek(state.source_position)
        self._choose_prefilter(state.prefilter_choice)

    @property
    def is_done(self) -> bool:
        """True once the last step has been taken."""
        return self.step >= self.config.train.n_steps

    def take_step(self) -> None:
        """Train on the next batch, and report metrics if a row is due; collective.

        `train_in_lockstep` calls this.

        Raises:
            NonFiniteLossError: If a loss or gradient was not finite; found only when metrics are
                reported, because the step itself does not wait for the device.
        """
        if self._began is None:
            self._prepare_kernels()
            self._began = time.perf_counter()
            self._clock.start()
        self._train_step()
        if self.step % self.report_every == 0 or self.is_done:
            self._report()

    def save_if_due(self, asked: bool) -> None:
        """Begin a checkpoint if the cadence, the end of training or `asked` requires one.

        Args:
            asked: Save regardless of the cadence.
        """
        every = max(1, self.config.checkpoint.every_tokens // self.config.train.batch_tokens)
        if self.step % every == 0 or self.is_done or asked:
            self.save()

    @property
    def save_overdue(self) -> bool:
        """True if `checkpoint.every_minutes` have passed since the last save began.

        Only rank 0's clock counts; on all other ranks this is always False.
        """
        minutes = self.config.checkpoint.every_minutes
        since_save_s = time.monotonic() - self.saver.last_began
        return minutes is not None and is_rank_zero() and since_save_s > 60 * minutes

    def end(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: If it could not be written.
        """
        self.saver.wait()
        self._seconds = time.perf_counter() - (self._began or time.perf_counter())

    @property
    def costs(self) -> dict[str, float]:
        """Time that training took on this rank, and the cost of its checkpoints.

        Returns:
            `seconds`: duration of training; `checkpoints`: number of saves; `checkpoint_pause_s`:
            seconds that training waited for saves (copies to the host, an earlier save that was
            still running, the last save); `checkpoint_memory_wait_s`: the part of it that was spent
            waiting for host memory; `checkpoint_writing_s`: seconds spent writing them.
        """
        return {
            "seconds": self._seconds,
            "checkpoints": self.saver.saves,
            "checkpoint_pause_s": self.saver.pause_s,
            "checkpoint_memory_wait_s": self.saver.memory_wait_s,
            "checkpoint_writing_s": self.saver.writing_s,
        }

    def save(self) -> None:
        """Begin a checkpoint; collective. `saver.wait()` returns once it is written."""
        self._raise_if_bad()
        sae, batch_tokens = self.engine.sae, self.config.train.batch_tokens
        paused = self.saver.pause_s
        state = CheckpointState(
            step=self.step,
            tokens=self.step * batch_tokens,
            source_position=self.source.position,
            source_identity=self.source.identity,
            seed=self.seed,
            batch_tokens=batch_tokens,
            d_model=sae.d_model,
            saes={self.engine.name: asdict(sae.config)},
            mesh=asdict(self.config.parallel),
            prefilter=asdict(self.prefilter) if self.prefilter else {},
        )
        self.saver.save(self.engine, state)
        self._clock.pause(self.saver.pause_s - paused)

    def _choose_prefilter(self, kept: PrefilterChoice | None) -> None:
        if self.config.train.prefilter == "auto":
            rows = self.config.train.batch_tokens // self.mesh.n_data
            self.prefilter = agree_on_prefilter(self.engine.sae, self._prefilters, rows, kept)

    def _prepare_kernels(self) -> None:
        sae = self.engine.sae
        k = sae.config.active_latents()
        if k is not None and isinstance(sae.kernels, Prepared):
            n_rows = self.config.train.batch_tokens // self.mesh.n_data
            n_latents = len(sae.W_enc)
            sae.kernels.prepare(n_rows, n_latents, sae.d_model, min(k, n_latents))

    def _train_step(self) -> None:
        with self._clock.waiting():
            batch = self.source.next()
        self._metrics.add(batch.x, self.engine.train_step(batch.x, self.step))
        self.step += 1

    def _report(self) -> None:
        self._raise_if_bad()
        seconds, waited, paused, steps = self._clock.lap()
        tokens_per_s = steps * self.config.train.batch_tokens / seconds
        row = {
            "time": time.time(),
            "step": self.step,
            "tokens": self.step * self.config.train.batch_tokens,
            "sae": self.engine.name,
            **self._metrics.reduce(),
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
        self.report(row)

    def _raise_if_bad(self) -> None:
        # Reading the flag waits for the device, so this runs only before a report or a save.
        step = int(self.engine.first_bad_step)
        if step < 0:
            return
        failed: CheckpointError | None = None
        try:
            self.saver.wait()  # let it finish: it has the weights from before the bad step
        except CheckpointError as error:
            failed = error
        raise NonFiniteLossError(
            f"{self.engine.name}: loss or gradient of step {step} is not finite; no weight was "
            "updated with such a value. Check the store with stage=verify, or start a new run with "
            "a lower optim.lr; run the same command again to resume from the last checkpoint"
        ) from failed


class _Clock:
    """Stopwatch: wall time, steps, and time waited for data and checkpoints since the last lap."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._began = time.perf_counter()
        self._waited = 0.0
        self._paused = 0.0
        self._steps = 0

    def pause(self, seconds: float) -> None:
        """Add time spent waiting for a checkpoint."""
        self._paused += seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's duration as time waiting for data, and the block as one step."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    def lap(self) -> tuple[float, float, float, int]:
        """Start a new lap and return the last one.

        Returns:
            Wall time, time waited for data and time waited for checkpoints, in seconds, and steps.
        """
        seconds = max(time.perf_counter() - self._began, 1e-9)
        lap = (seconds, self._waited, self._paused, self._steps)
        self.start()
        return lap


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for `train.compute_dtype` on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
