"""When training waits for a checkpoint and when it does not: a copy, then a thread that writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sae_core.checkpoint.folder import CheckpointState
from sae_core.checkpoint.save import Retention, write_checkpoint
from sae_core.checkpoint.staging import HostCopy
from sae_core.config import CheckpointConfig
from sae_core.engine import SAEEngine
from sae_core.mesh import Mesh


class CheckpointSaver:
    """Saves one checkpoint after the other; all ranks call the same methods in the same order.

    A save copies this rank's share to the host and returns; files, hashes, votes, rename and
    pruning happen in a thread with a process group that nobody else uses. One save runs at a time:
    the next one waits for it, which counts as pause.

    Args:
        root: the run's `checkpoints` folder.
        config: whether in the background, and what stays.
        mesh: of the training.
        device: where the parameters are.
        batch_tokens: tokens of a step.
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
        self._root, self._asynchronous = root, config.asynchronous
        self._timeout_s = config.timeout_s
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_s))
        self._copy = HostCopy(mesh, device, keep=config.asynchronous)
        self._writing: _Background | None = None
        self._waiting = False
        self.last_began = time.monotonic()
        """When the newest save began, or training; `time.monotonic`."""
        self.saves = 0
        self.pause_s = 0.0
        """What training has waited for checkpoints so far."""
        self.writing_s = 0.0
        """What finished saves took beside their copy."""

    def save(self, engines: list[SAEEngine], state: CheckpointState) -> None:
        """Begins to save; the engines may go on when it returns.

        Raises:
            CheckpointError: the save before this one could not be written; on all ranks.
        """
        self.wait()
        with self._pausing():
            self.last_began = time.monotonic()
            tensors = self._copy.take(engines)
            self._writing = _Background(
                lambda: write_checkpoint(self._root, tensors, state, self._retention, self._group)
            )
            self._writing.start()
            self.saves += 1
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns once the save that runs, if any, is published and older ones are pruned.

        Raises:
            CheckpointError: it could not be written; on all ranks.
        """
        if self._writing is None:
            return
        with self._pausing():
            self._waiting = True
            self._writing.join()
            self._waiting = False
        writing, self._writing = self._writing, None
        self.writing_s += writing.seconds
        if writing.error is not None:
            raise writing.error

    @property
    def waits(self) -> int:
        """A number that moves on while training waits for a save within `checkpoint.timeout_s`.

        Bytes in the folder would not do: the longest part may be the flush, or another rank's.
        """
        taken_s = time.monotonic() - self.last_began
        return int(10 * taken_s) + 1 if self._waiting and taken_s < self._timeout_s else 0

    @property
    def failed(self) -> bool:
        """Whether the save that ran last failed here, and `wait` would raise at once."""
        return self._writing is not None and self._writing.error is not None

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.pause_s += time.perf_counter() - began


class _Background(threading.Thread):
    """Runs an action and keeps what it raised.

    A daemon: when a rank leaves because of an error, what it was writing is not waited for.
    """

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._action = action
        self.error: BaseException | None = None
        self.seconds = 0.0

    def run(self) -> None:
        """The thread's body."""
        began = time.perf_counter()
        try:
            self._action()
        except BaseException as error:  # noqa: BLE001 - raised again in the training thread
            self.error = error
        self.seconds = time.perf_counter() - began
