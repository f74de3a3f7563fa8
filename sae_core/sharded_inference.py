"""Inference with an SAE of any size: shards of its latents, on one device or several.

If the devices can hold the SAE together, each keeps its shard. Otherwise every call reads all
shards from disk, one after another, and passes all of its rows through each of them. Either way the
active latents are those of the whole SAE: they are chosen among the active latents of all shards
(`SAE.merge`). Reconstructions are sums over shards, so they differ from those of the whole SAE by
the rounding of float32 sums.

Shape legend: N rows of a call, R rows of a batch, D d_model, L latents, K active latents per row.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch

from sae_core.architectures.settings import SAEConfig
from sae_core.checkpoint.stored_sae import MATRICES, StoredSAE, row_names
from sae_core.errors import ShapeError
from sae_core.inference import SAE, inference_class
from sae_core.inference_memory import READ_THREADS, ShardPlan
from sae_core.kernels import Kernels

Pairs = tuple[torch.Tensor, torch.Tensor]
"""Values [R, K] float32 and indices [R, K] int64."""


class _Shard(NamedTuple):
    """Latents [start, stop) of the SAE."""

    start: int
    stop: int
    sae: SAE | None
    """The shard's weights if its device keeps them."""


class ShardedSAE:
    """A trained SAE that encodes and decodes in bounded memory; see `SparseCoder`.

    Args:
        stored: The SAE on disk.
        plan: Devices, sizes of shards and batches, and whether the devices keep their shards.
        kernels: Implementation of the sparse operations on these devices. The encoder's weights
            are converted to its `copy_dtype` when they are read. Decoding is always in float32.
    """

    def __init__(self, stored: StoredSAE, plan: ShardPlan, kernels: Kernels) -> None:
        self.stored = stored
        self.plan = plan
        self.kernels = kernels
        self.read_bytes = 0
        """Bytes of weights read from disk so far."""
        self._class = inference_class(stored.config)
        ranges = plan.shards(stored.config.n_latents)
        self._shards: list[list[_Shard]] = [[] for _ in plan.devices]
        """The shards of each device."""
        for index, (start, stop) in enumerate(ranges):
            place = index % len(plan.devices)
            sae = self._load(start, stop, plan.devices[place], "both") if plan.resident else None
            self._shards[place].append(_Shard(start, stop, sae))
        if plan.resident:
            self._count_read("both")

    @property
    def config(self) -> SAEConfig:
        """Settings of the SAE."""
        return self.stored.config

    @property
    def d_model(self) -> int:
        """Width D of the activations."""
        return self.stored.d_model

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return sum(map(len, self._shards))

    @property
    def rows_device(self) -> torch.device:
        """Device on which a caller should keep rows: that of a resident SAE, else the host."""
        return self.plan.devices[0] if self.plan.resident else torch.device("cpu")

    @torch.no_grad()
    def encode_topk(self, x: torch.Tensor) -> Pairs:
        """Return the active latents of each row, in descending order of their values.

        Args:
            x: [..., D] raw activations of any float dtype, on any device.

        Returns:
            As `SAE.encode_topk`, on the device of `x`.

        Raises:
            ShapeError: If the last dimension of `x` is not D.
            DamagedCheckpointError: If a shard cannot be read.
        """
        if x.shape[-1] != self.d_model:
            raise ShapeError(f"x of shape {tuple(x.shape)}: expected [..., {self.d_model}]")
        flat = x.reshape(-1, self.d_model)
        found = self._encode_on_each_device(flat)
        self._count_read("encoder")
        batches = found[0]
        for other in found[1:]:
            batches = [self._merged(a, b) for a, b in zip(batches, other, strict=True)]
        values, indices = _joined(batches)
        shape = (*x.shape[:-1], values.shape[1])
        return values.view(shape), indices.view(shape)

    @torch.no_grad()
    def decode_topk(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Decode the output of `encode_topk` into raw activations [..., D], float32.

        The result is on the device of `values`.

        Raises:
            DamagedCheckpointError: If a shard cannot be read.
        """
        # Not -1, which is ambiguous if no latent is active.
        shape = (math.prod(values.shape[:-1]), values.shape[-1])
        pairs = values.reshape(shape), indices.reshape(shape)
        recon = values.new_zeros(len(pairs[0]), self.d_model)
        # Shards are added one after another, including those of different devices: one sum of rows
        # needs less memory than one per device, and its order does not depend on the devices.
        placed = zip(self.plan.devices, self._shards, strict=True)
        every = [(shard, device) for device, shards in placed for shard in shards]
        for shard, device in sorted(every, key=lambda one: one[0].start):
            with _current(device):
                self._add_decoded(shard, device, pairs, recon)
        self._count_read("decoder")
        recon += self.stored.b_dec.to(recon.device)
        return recon.view(*values.shape[:-1], self.d_model)

    def _encode_on_each_device(self, x: torch.Tensor) -> list[list[Pairs]]:
        """Run `_encode_on` on all devices at the same time."""

        def encode(device: torch.device, shards: list[_Shard]) -> list[Pairs]:
            # Neither the current device nor the gradient mode is passed on to a thread.
            with torch.no_grad(), _current(device):
                return self._encode_on(device, shards, x)

        shards = [own for own in self._shards if own]
        devices = self.plan.devices[: len(shards)]
        if len(shards) == 1:
            return [encode(devices[0], shards[0])]
        with ThreadPoolExecutor(len(shards)) as pool:
            return list(pool.map(encode, devices, shards))

    def _encode_on(
        self, device: torch.device, shards: list[_Shard], x: torch.Tensor
    ) -> list[Pairs]:
        """Return the active latents among those of a device's shards, for each batch of rows."""
        batches: list[Pairs] = []
        for shard in shards:
            sae = shard.sae or self._load(shard.start, shard.stop, device, "encoder")
            for i, rows in enumerate(x.split(self.plan.batch_rows)):
                values, indices = sae.encode_topk(rows.to(device))
                new = values.to(x.device), (indices + shard.start).to(x.device)
                if i < len(batches):
                    batches[i] = self._merged(batches[i], new)
                else:
                    batches.append(new)
            del sae  # before the next one is read
        return batches

    def _add_decoded(
        self, shard: _Shard, device: torch.device, pairs: Pairs, recon: torch.Tensor
    ) -> None:
        """Add a shard's part of the reconstructions to `recon` [N, D], without `b_dec`."""
        values, indices = pairs
        step = self.plan.batch_rows
        sae = shard.sae or self._load(shard.start, shard.stop, device, "decoder")
        for first in range(0, len(values), step):
            own = indices[first : first + step].to(device) - shard.start
            weights = values[first : first + step].to(device)
            if self.n_shards > 1:
                outside = (own < 0) | (own >= shard.stop - shard.start)
                # Pairs whose value is 0 are ignored, so any index of the shard will do.
                weights = weights.masked_fill(outside, 0.0)
                own = own.masked_fill(outside, 0)
            recon[first : first + step] += sae.decode_rows(weights, own).to(recon.device)

    def _merged(self, a: Pairs, b: Pairs) -> Pairs:
        values = torch.cat((a[0], b[0]), dim=1)
        return self._class.merge(self.config, values, torch.cat((a[1], b[1]), dim=1))

    def _load(
        self,
        start: int,
        stop: int,
        device: torch.device,
        part: Literal["encoder", "decoder", "both"],
    ) -> SAE:
        """Read a shard onto a device, as a whole or only what encoding or decoding needs."""
        tensors: dict[str, Any] = {}
        left_out = {"encoder": "W_dec", "decoder": "W_enc"}.get(part)
        for name in row_names(self.config):
            dtype = torch.float32
            if name == "W_enc" and self.kernels.copy_dtype is not None:
                dtype = self.kernels.copy_dtype
            columns = (self.d_model,) if name in MATRICES else ()
            rows = 0 if name == left_out else stop - start
            # In inference mode, threads could not write to it.
            with torch.inference_mode(False):
                tensors[name] = torch.empty(rows, *columns, dtype=dtype, device=device)
            if rows:
                self._read(name, start, tensors[name])
        b_dec = self.stored.b_dec.to(device)
        sae = self._class(self.config, **tensors, b_dec=b_dec, step=self.stored.step)
        sae.kernels = self.kernels
        return sae

    def _read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows of a tensor from `start` on, in blocks that threads read."""
        row_bytes = 4 * (self.d_model if name in MATRICES else 1)
        step = max(1, self.plan.block_bytes // row_bytes)

        def copy(first: int) -> None:
            last = min(first + step, len(out))
            with torch.no_grad():
                out[first:last].copy_(self.stored.rows[name](start + first, start + last))

        with ThreadPoolExecutor(READ_THREADS) as pool:
            for _ in pool.map(copy, range(0, len(out), step)):
                pass  # raises the error of a block

    def _count_read(self, part: Literal["encoder", "decoder", "both"]) -> None:
        """Add the bytes of all shards' matrices, if the devices do not keep them."""
        if self.plan.resident and part != "both":
            return
        matrices = 2 if part == "both" else 1
        self.read_bytes += matrices * 4 * self.config.n_latents * self.d_model


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a numbered CUDA device current: kernels are launched on the current one."""
    if device.type == "cuda" and device.index is not None:
        return torch.cuda.device(device)
    return nullcontext()


def _joined(batches: list[Pairs]) -> Pairs:
    """Join batches of different widths into one; missing values are 0."""
    if len(batches) == 1:
        return batches[0]
    width = max(values.shape[1] for values, _ in batches)
    n_rows = sum(len(values) for values, _ in batches)
    all_values = batches[0][0].new_zeros(n_rows, width)
    all_indices = batches[0][1].new_zeros(n_rows, width)
    first = 0
    while batches:
        values, indices = batches.pop(0)  # so that its memory can be used again
        part = slice(first, first + len(values))
        all_values[part, : values.shape[1]] = values
        all_indices[part, : values.shape[1]] = indices
        first += len(values)
    return all_values, all_indices
