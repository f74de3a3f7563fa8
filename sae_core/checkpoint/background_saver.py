"""Save checkpoints in the background: copy to the host, and write in a thread."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sae_core.checkpoint.folder import CheckpointState
from sae_core.checkpoint.host_copy import HostCopy, Staging
from sae_core.checkpoint.own_tensors import own_tensors
from sae_core.checkpoint.save import Retention, write_checkpoint
from sae_core.config import CheckpointConfig
from sae_core.distributed.mesh import Mesh
from sae_core.distributed.ranks import is_rank_zero
from sae_core.engine.deepspeed_engine import SAEEngine


class CheckpointSaver:
    """Saves checkpoints, one at a time. All ranks must call the same methods in the same order.

    A save copies this rank's share to the host and returns. A thread with its own process group
    writes and hashes the files, votes, renames the folder and prunes older checkpoints. If the host
    has no room for the whole share, training also waits until enough of it is written, and a
    warning says so once. If a save is still running, the next one waits for it. All waits count
    towards `pause_s`.

    Args:
        root: The run's `checkpoints` folder.
        config: Whether to write in the background, which checkpoints to keep, and the time limit.
        mesh: The trainer's mesh.
        device: Device of the parameters.
        batch_tokens: Tokens in a global batch.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        mesh: Mesh,
        device: torch.device,
        batch_tokens: int,
    ) -> None:
        every = config.keep_every_tokens
        self._retention = Retention(
            config.keep, None if every is None else max(1, every // batch_tokens)
        )
        self._root = root
        self._asynchronous = config.asynchronous
        self._timeout_s = config.timeout_s
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_s))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._mesh = mesh
        self._device = device
        self._copy = HostCopy(mesh, device, config.asynchronous, self._group)
        self._writing: _Background | None = None
        self._waiting = False
        self.last_began = time.monotonic()
        """`time.monotonic()` at the start of the newest save, or at the start of training if there
        is none."""
        self.saves = 0
        """Number of saves begun."""
        self.pause_s = 0.0
        """Seconds that training has waited for checkpoints so far."""
        self.writing_s = 0.0
        """Seconds that finished saves took in the background, excluding the copy to the host."""

    def save(self, engine: SAEEngine, state: CheckpointState) -> None:
        """Begin a save. The engine may be changed as soon as this returns.

        Raises:
            CheckpointError: If the previous save failed; raised on all ranks.
        """
        self.wait()
        with self._pausing():
            self.last_began = time.monotonic()
            self._prepare(engine)
            staging = Staging()
            own = own_tensors(engine, self._mesh)
            self._writing = _Background(
                lambda: write_checkpoint(
                    self._root, own, staging, state, self._retention, self._group
                ),
                self._device,
            )
            self._writing.start()
            self.saves += 1
            # While this waits for blocks to be written, the watchdog must see progress.
            with self._waiting_for_save():
                self._copy.take(engine, staging)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the running save, if any, is published and older checkpoints are deleted.

        Raises:
            CheckpointError: If it failed; raised on all ranks.
        """
        if self._writing is None:
            return
        with self._pausing(), self._waiting_for_save():
            self._writing.join()
        writing, self._writing = self._writing, None
        self.writing_s += writing.seconds
        if writing.error is not None:
            raise writing.error

    def _prepare(self, engine: SAEEngine) -> None:
        """Choose the host memory of all saves, before the first one; collective."""
        self._copy.prepare(engine)
        if self._copy.short_bytes and not self.saves and is_rank_zero():
            whole, short = self._copy.n_bytes / 2**30, self._copy.short_bytes / 2**30
            warnings.warn(
                f"checkpoints are not saved fully in the background: a rank's part has {whole:.2f} "
                f"GiB, and its host can spare {whole - short:.2f} GiB, so training "
                f"waits until {short:.2f} GiB of each checkpoint are written. To shorten these "
                "pauses, use a host with more memory, optim.moments=bfloat16, or more ranks on "
                "more hosts",
                stacklevel=3,
            )

    @property
    def memory_wait_s(self) -> float:
        """Seconds of `pause_s` in which training waited for lack of host memory."""
        return self._copy.blocked_s

    @property
    def waits(self) -> int:
        """Counter that keeps changing while training waits for a save.

        The watchdog reads it, so that such a wait does not count as a hang. It drops back to 0
        once the save has taken longer than `checkpoint.timeout_s`. It is based on the clock, not
        on the bytes written, because the longest part of a save may be the flush, or the work of
        another rank.
        """
        taken_s = time.monotonic() - self.last_began
        return int(10 * taken_s) + 1 if self._waiting and taken_s < self._timeout_s else 0

    @property
    def failed(self) -> bool:
        """True if the last save has failed on this rank, so that `wait` would raise at once."""
        return self._writing is not None and self._writing.error is not None

    @contextmanager
    def _waiting_for_save(self) -> Iterator[None]:
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.pause_s += time.perf_counter() - began


class _Background(threading.Thread):
    """Thread that runs an action and records any error that it raises.

    It is a daemon thread: a rank that exits because of an error does not wait for a save.
    """

    def __init__(self, action: Callable[[], object], device: torch.device) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._action = action
        self._device = device
        self.error: BaseException | None = None
        self.seconds = 0.0

    def run(self) -> None:
        """Run the action, and record its error and duration."""
        began = time.perf_counter()
        try:
            if self._device.type == "cuda":
                # A thread begins on device 0, where a call to CUDA would create a second context.
                torch.cuda.set_device(self._device)
            self._action()
        except BaseException as error:  # raised again by `wait`, in the training thread
            self.error = error
        self.seconds = time.perf_counter() - began
