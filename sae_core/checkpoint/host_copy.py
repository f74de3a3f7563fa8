"""Copy a checkpoint to host memory between two steps, as much at once as the memory allows.

The training thread copies the bytes of this rank's tensors, in order, into blocks of host memory,
and passes each block to the writing thread, which writes it to a file and returns it. If the host
has room for blocks for all bytes, training waits for the copy only. Otherwise the blocks are reused
in turn: training waits until the last bytes are copied, so that they are those of the step at which
the save began, and therefore until all other bytes are written.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist

from foundation.host_memory import available_bytes
from sae_core.checkpoint.own_tensors import contents, own_tensors
from sae_core.distributed.mesh import Mesh
from sae_core.engine.deepspeed_engine import SAEEngine

BLOCK_BYTES = 64 << 20
"""Size of a block. It is a power of two, to which torch rounds up every pinned allocation."""
FEWEST_BLOCKS = 2
"""Blocks with which one can be written while the next is copied."""
MEMORY_SHARE = 0.5
"""Share of a host's available memory that blocks may take. The page cache of the files being
written, the loaders and other processes need the rest."""


class Piece(NamedTuple):
    """Consecutive bytes of a tensor, in host memory."""

    key: str
    """Name of the tensor in the checkpoint."""
    first_byte: int
    """Index of the first byte in this rank's rows of the tensor."""
    data: torch.Tensor
    """[n] uint8."""


class StagedBlock:
    """Pieces that share a block, as a context manager that returns the block when it ends."""

    def __init__(self, pieces: list[Piece], release: Callable[[], None]) -> None:
        self._pieces = pieces
        self._release = release

    def __enter__(self) -> list[Piece]:
        return self._pieces

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()


class Staging:
    """Queue for the bytes of one save, from the training thread to the writing thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[StagedBlock | BaseException | None] = SimpleQueue()
        self._ended = False

    def put(self, block: StagedBlock) -> None:
        """Pass a block to the writing thread."""
        self._queue.put(block)

    def close(self, error: BaseException | None = None) -> None:
        """Signal that no block follows, or that copying failed with `error`."""
        self._queue.put(error)

    def next(self) -> StagedBlock | None:
        """Wait for the next block and return it; None after the last one.

        Raises:
            RuntimeError: If the training thread could not copy all tensors.
        """
        item = self._queue.get()
        if isinstance(item, StagedBlock):
            return item
        self._ended = True
        if item is not None:
            raise RuntimeError(f"copying to host memory failed: {item!r}") from item
        return None

    def discard(self) -> None:
        """Return all blocks that were not read, until the last one.

        The training thread would otherwise wait for a block forever after writing has failed.
        """
        while not self._ended:
            item = self._queue.get()
            if isinstance(item, StagedBlock):
                with item:
                    continue
            self._ended = True


class HostCopy:
    """Copies this rank's share of a checkpoint to host memory, in blocks that all saves reuse.

    Args:
        mesh: The trainer's mesh.
        device: Device of the parameters. Blocks for CUDA tensors are pinned.
        asynchronous: Take as many blocks as the host can spare, so that training continues as early
            as possible. If False, training waits for the whole save: on a GPU, two blocks are used
            in turn, and on the CPU the tensors themselves are written.
        group: A gloo group of all ranks.
    """

    def __init__(
        self, mesh: Mesh, device: torch.device, asynchronous: bool, group: dist.ProcessGroup
    ) -> None:
        self._mesh = mesh
        self._device = device
        self._asynchronous = asynchronous
        self._in_place = not asynchronous and device.type == "cpu"
        self._group = group
        self._free: SimpleQueue[torch.Tensor] = SimpleQueue()
        self._made = 0
        self._prepared = False
        self._block_bytes = 0
        self.n_blocks = 0
        """Largest number of blocks; 0 before the first save, and where none are needed."""
        self.n_bytes = 0
        """Bytes that this rank writes per save; 0 before the first save."""
        self.blocked_s = 0.0
        """Seconds that training has waited for blocks to be written, for lack of host memory."""

    @property
    def short_bytes(self) -> int:
        """Bytes that must be written before training continues, for lack of host memory."""
        if not self._asynchronous:
            return 0
        return max(0, self.n_bytes - self.n_blocks * self._block_bytes)

    def prepare(self, engine: SAEEngine) -> None:
        """Choose the number of blocks, before the first save; collective over all ranks."""
        if self._prepared:
            return
        self._prepared = True
        self.n_bytes = sum(own.n_bytes for own in own_tensors(engine, self._mesh))
        # Every rank takes part, including those that write nothing.
        share = host_share_bytes(self._group) if self._asynchronous else 0.0
        self._block_bytes = max(1, min(BLOCK_BYTES, self.n_bytes))
        self.n_blocks = blocks_for(self.n_bytes, self._block_bytes, share)

    def take(self, engine: SAEEngine, staging: Staging) -> None:
        """Copy weights, buffers and moments to `staging` and close it; collective under ZeRO 1.

        When this returns, the engine may be changed.
        """
        try:
            if self._in_place:
                self._pass_on(engine, staging)
            else:
                self._copy(engine, staging)
        except BaseException as error:
            staging.close(error)
            raise
        staging.close()

    def _pass_on(self, engine: SAEEngine, staging: Staging) -> None:
        """Pass the tensors themselves, each once the last one is written."""
        for own, tensor in contents(engine, self._mesh):
            written = threading.Event()
            staging.put(StagedBlock([Piece(own.key, 0, _bytes_of(tensor))], written.set))
            written.wait()

    def _copy(self, engine: SAEEngine, staging: Staging) -> None:
        block: torch.Tensor | None = None
        pieces: list[Piece] = []
        used = 0
        for own, tensor in contents(engine, self._mesh):
            flat = _bytes_of(tensor)
            done = 0
            while done < len(flat):
                if block is None:
                    block, pieces, used = self._block(), [], 0
                count = min(len(flat) - done, len(block) - used)
                data = block[used : used + count]
                data.copy_(flat[done : done + count], non_blocking=True)
                pieces.append(Piece(own.key, done, data))
                done, used = done + count, used + count
                if used == len(block):
                    self._pass(staging, block, pieces)
                    block = None
        if block is not None:
            self._pass(staging, block, pieces)

    def _pass(self, staging: Staging, block: torch.Tensor, pieces: list[Piece]) -> None:
        if self._device.type == "cuda":
            # The writing thread must not touch CUDA, so wait here for the copies to finish.
            torch.cuda.current_stream(self._device).synchronize()
        staging.put(StagedBlock(pieces, lambda: self._free.put(block)))

    def _block(self) -> torch.Tensor:
        """Return a free block; if there are `n_blocks` of them already, wait for one."""
        if self._made < self.n_blocks and self._free.empty():
            self._made += 1
            pin = self._device.type == "cuda"
            return torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=pin)
        began = time.perf_counter()
        block = self._free.get()
        if self._asynchronous:
            self.blocked_s += time.perf_counter() - began
        return block


def blocks_for(n_bytes: int, block_bytes: int, share_bytes: float) -> int:
    """Return how many blocks a rank uses for a copy of `n_bytes`.

    Args:
        n_bytes: Bytes that the rank writes per save.
        block_bytes: Size of a block.
        share_bytes: Available memory of the host, divided by the ranks on it.
    """
    wanted = -(-n_bytes // block_bytes)
    if MEMORY_SHARE * share_bytes >= wanted * block_bytes:
        return wanted
    return min(wanted, max(FEWEST_BLOCKS, int(MEMORY_SHARE * share_bytes // block_bytes)))


def host_share_bytes(group: dist.ProcessGroup) -> float:
    """Return the available memory per rank of the host with the least; collective.

    All ranks measure before any of them allocates, and all get the same number. It is infinite if
    no host reports its memory.
    """
    own = (socket.gethostname(), available_bytes())
    found: list[tuple[str, int | None] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    ranks = [one for one in found if one is not None]
    hosts = [host for host, _ in ranks]
    shares = [free / hosts.count(host) for host, free in ranks if free is not None]
    return min(shares, default=float("inf"))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, [n] uint8, on its device."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
