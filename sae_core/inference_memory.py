"""Choose how many latents and rows a trained SAE holds in memory at once.

Shape legend: L latents, l latents of one shard, D d_model, K active latents per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foundation.errors import ConfigError
from sae_core.architectures.registry import architecture_of
from sae_core.architectures.settings import SAEConfig
from sae_core.checkpoint.safetensors_file import BLOCK_BYTES
from sae_core.kernels.stock.encode import PIECE_ELEMENTS

READ_THREADS = 2
"""Threads that read blocks of a shard from disk."""
_KEY = "eval.max_memory_gib"
_GIB = 1 << 30
_CPU_BATCH_ROWS = 2048
_CUDA_BATCH_ROWS = 16384
_FEW_BATCH_ROWS = 64
_MIN_SHARD_LATENTS = 64
"""With smaller batches or shards, an evaluation would take far too long."""
_ACTIVE_IF_UNKNOWN = 4096
"""Active latents per row to reserve memory for, if their number depends on the data."""
_ENCODE_BYTES = 12
"""Bytes that the stock kernels need for each pre-activation of a piece: the value itself, and what
its selection needs."""
_TRITON_ROW_BYTES = 8192
"""Bytes per row of the Triton encoder's pools and sort buffers."""


@dataclass(frozen=True)
class ShardPlan:
    """Division of an SAE over devices and over time."""

    devices: tuple[torch.device, ...]
    """Devices that take part."""
    shard_latents: int
    """Latents per shard; the last shard may have fewer."""
    resident: bool
    """True if each device keeps its shard. Otherwise all shards are read from disk, one after
    another, for each call."""
    batch_rows: int
    """Rows that a device encodes or decodes at a time."""
    rows_at_once: int
    """Most rows to pass to one call. If the SAE is not resident, a call with many rows costs the
    same reads as one with few."""
    block_bytes: int = BLOCK_BYTES
    """Size of the blocks in which shards are read."""

    def shards(self, n_latents: int) -> list[tuple[int, int]]:
        """Return the latents [start, stop) of each shard."""
        step = self.shard_latents
        return [(start, min(start + step, n_latents)) for start in range(0, n_latents, step)]


def plan_shards(
    config: SAEConfig,
    d_model: int,
    devices: Sequence[torch.device],
    limit_bytes: int,
    encoder_itemsize: int = 4,
) -> ShardPlan:
    """Divide an SAE so that it fits, keeping it in memory if possible.

    Args:
        config: Settings of the SAE.
        d_model: Width D.
        devices: Devices that may be used, all of the same type. As few are used as hold the SAE
            together; if they cannot hold it, all are used.
        limit_bytes: Memory for weights, rows and intermediate results, on each device and on the
            host. On the CPU, these are the same memory. The SAE's biases and the caller's data
            with one number per latent are not included.
        encoder_itemsize: Bytes per element of the encoder's weights; those of the decoder have 4.

    Raises:
        ConfigError: If the limit is too low for any shard.
    """
    if devices[0].type == "cuda":
        return _plan_cuda(config, d_model, tuple(devices), limit_bytes, encoder_itemsize)
    return _plan_cpu(config, d_model, tuple(devices), limit_bytes)


def _plan_cpu(
    config: SAEConfig, d_model: int, devices: tuple[torch.device, ...], limit_bytes: int
) -> ShardPlan:
    n_latents, n_devices = config.n_latents, len(devices)
    row_bytes = _row_bytes(config, d_model, n_devices)
    encode = _ENCODE_BYTES * min(_CPU_BATCH_ROWS * n_latents, n_devices * PIECE_ELEMENTS)
    fixed = encode + _CPU_BATCH_ROWS * row_bytes + READ_THREADS * BLOCK_BYTES
    if n_latents * _latent_bytes(config, d_model, 4) + fixed <= limit_bytes:
        per_device = -(-n_latents // n_devices)
        return ShardPlan(devices, per_device, True, _CPU_BATCH_ROWS, _CPU_BATCH_ROWS)
    # A quarter for one matrix of each device's shard, an eighth each for encoding and for blocks
    # that are read, and half for rows.
    per_matrix = limit_bytes // 4 // n_devices
    per_encode = limit_bytes // 8 // n_devices
    batch = _CPU_BATCH_ROWS
    most = per_matrix // (4 * d_model)
    if per_encode < _ENCODE_BYTES * PIECE_ELEMENTS:
        # Encoding takes memory for all latents of the shard at once.
        most = min(most, per_encode // (_ENCODE_BYTES * _FEW_BATCH_ROWS))
        batch = min(batch, per_encode // (_ENCODE_BYTES * max(most, 1)))
    shard = _even(n_latents, most)
    rows = limit_bytes // 2 // row_bytes
    if shard < min(_MIN_SHARD_LATENTS, n_latents) or rows < _FEW_BATCH_ROWS:
        needed = max(
            4 * n_devices * 4 * d_model * _MIN_SHARD_LATENTS,
            8 * n_devices * _ENCODE_BYTES * _FEW_BATCH_ROWS * _MIN_SHARD_LATENTS,
            2 * row_bytes * _FEW_BATCH_ROWS,
        )
        raise _too_low(limit_bytes, needed)
    block = min(BLOCK_BYTES, limit_bytes // 8 // READ_THREADS // n_devices)
    return ShardPlan(devices, shard, False, min(batch, rows), rows, block)


def _plan_cuda(
    config: SAEConfig,
    d_model: int,
    devices: tuple[torch.device, ...],
    limit_bytes: int,
    encoder_itemsize: int,
) -> ShardPlan:
    n_latents, batch = config.n_latents, _CUDA_BATCH_ROWS
    # The batch's part of rows and results, the Triton pools, and the pieces of the stock kernels,
    # for users who chose those.
    fixed = batch * (2 * _row_bytes(config, d_model, 1) + _TRITON_ROW_BYTES)
    fixed += _ENCODE_BYTES * PIECE_ELEMENTS + READ_THREADS * BLOCK_BYTES
    latent_bytes = _latent_bytes(config, d_model, encoder_itemsize)
    for used in range(1, len(devices) + 1):
        per_device = -(-n_latents // used)
        if per_device * latent_bytes + fixed <= limit_bytes:
            return ShardPlan(devices[:used], per_device, True, batch, batch)
    # One matrix of the shard at a time, and on the host the rows.
    most = (limit_bytes - fixed) // (4 * d_model)
    shard = _even(n_latents, min(most, -(-n_latents // len(devices))))
    if shard < min(_MIN_SHARD_LATENTS, n_latents):
        raise _too_low(limit_bytes, fixed + 4 * d_model * _MIN_SHARD_LATENTS)
    rows = limit_bytes // 2 // _row_bytes(config, d_model, len(devices))
    return ShardPlan(devices, shard, False, batch, max(rows, batch))


def _row_bytes(config: SAEConfig, d_model: int, n_devices: int) -> int:
    """Return the bytes of one row's input, reconstruction, and active latents.

    The active latents exist once for every device, and twice while they are merged.
    """
    active = config.active_latents() or min(_ACTIVE_IF_UNKNOWN, config.n_latents)
    pairs = 12 * active  # float32 values and int64 indices
    return 8 * d_model + (n_devices + 2) * pairs


def _latent_bytes(config: SAEConfig, d_model: int, encoder_itemsize: int) -> int:
    """Return the bytes of one latent's weights."""
    vectors = 1 + len(architecture_of(config).vectors)
    return d_model * (encoder_itemsize + 4) + 4 * vectors


def _even(n_latents: int, most: int) -> int:
    """Return the size of the fewest equal shards of at most `most` latents; 0 if `most` is."""
    if most < 1:
        return 0
    return -(-n_latents // -(-n_latents // most))


def _too_low(limit_bytes: int, needed: int) -> ConfigError:
    return ConfigError(
        _KEY,
        round(limit_bytes / _GIB, 4),
        f"at least {needed / _GIB:.3g} GiB for rows of this width and shards of this SAE",
        "raise it, or use a machine with more free memory",
    )
