"""Memory of one rank by part, counted from the arrays that the code holds at once.

The arrays of a step on a GPU are in `step_buffers.py`.
"""

from __future__ import annotations

from cluster.planning.hardware import Hardware
from cluster.planning.step_buffers import gpu_buffers, peak
from cluster.planning.work import Work
from sae_core.checkpoint.host_copy import BLOCK_BYTES, FEWEST_BLOCKS, blocks_for
from sae_core.kernels.stock.encode import PIECE_ELEMENTS

_SELECT_COPIES = 2
"""Copies of the pre-activations of a piece (the latents encoded at once): the encoder product, and
the part of the product from which the top k are selected."""
_PACKED_COPIES = 2
"""Copies of a piece's low-precision weights: this project's, and oneDNN's in its memory order."""
_PAIR_BYTES = 12 * 8
"""Bytes of an active (row, latent) pair: keys, candidates, row, latent, value, and sorted
copies."""
_ZERO_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce bucket, at its default size. It is allocated on first use."""
_HOST_BLOCKS = 3
"""Blocks of rows that the loader of a GPU rank holds in pinned memory: one that is read, one that
is used, and one whose copy to the GPU may still run."""
_UPLOADED = 3
"""Uploads that a GPU holds at once: the one in use, the next one, and one that may still be read by
work on the device after the host has dropped it (`sae_core.training.upload`). What is uploaded are
blocks of stored rows, or in a mixture batches."""
_SAMPLE_COPIES = 4
"""Copies of the calibration sample: raw rows, normalised rows, and two temporaries of the geometric
median."""


def device_bytes(work: Work, hardware: Hardware) -> dict[str, float]:
    """Return the parts of a rank's peak memory, on the GPU or in the process of a CPU rank.

    Args:
        work: The rank's work.
        hardware: The rank's hardware, including the fixed memory of a process.

    Returns:
        `{part: bytes}`, whose sum is the peak. The calibration sample is freed before the first
        step, so it counts only if it exceeds the memory that the steps need.
    """
    zero_share = work.data if work.zero_stage else 1
    loader: float = 3 * (work.buffer_rows + work.rows // work.latent) * work.row_bytes
    if work.on_gpu:
        # The step counts one batch itself; see `_UPLOADED`.
        loader = (_UPLOADED - 1) * work.rows * work.row_bytes
        if not work.mixture:
            loader = _UPLOADED * work.block_rows * work.stored_row_bytes
    if work.on_gpu:
        step = sum(peak(gpu_buffers(work))[1].values())
    else:
        # Add these instead of taking the maximum: the allocator keeps the encoder's memory, and the
        # update does not reuse it because it needs other sizes.
        step = _batch_bytes(work) + _encode_bytes(work) + _update_bytes(work)
    sample = _SAMPLE_COPIES * work.sample_rows * work.d_model * 4
    parts = {
        "process": hardware.process_bytes,
        "weights": 4 * work.parameters,
        "moments": 2 * work.moment_bytes * work.parameters / zero_share,
        "gradients": 0 if work.fused else 4 * work.parameters,
        "low-precision copies": 2 * work.matrix * work.copy_bytes,
        "ZeRO's masters and bucket": _zero_bytes(work),
        "reduce bucket": _bucket_bytes(work),
        "tokens since fired": 8 * work.shard,
        "loader": loader,
        "input map": _map_bytes(work),
        "step": max(step, sample - _held_later(work)),
    }
    return {part: size for part, size in parts.items() if size}


def host_bytes(work: Work, room_bytes: float = float("inf")) -> dict[str, float]:
    """Return a rank's other host memory, for checkpoints and GPU loading, as `{part: bytes}`.

    Files are written directly from the copy of a checkpoint.

    Args:
        work: The rank's work.
        room_bytes: Memory that a rank's host has left for these parts.
    """
    loader: float = _HOST_BLOCKS * work.block_rows * work.host_row_bytes if work.on_gpu else 0
    parts = {
        "checkpoint copy": copy_bytes(work, room_bytes - loader),
        "loader, pinned": loader,
    }
    return {part: size for part, size in parts.items() if size}


def saved_bytes(work: Work) -> float:
    """Return the bytes that a rank writes per checkpoint, without biases."""
    rows = -(-work.shard // work.data)
    return 2 * rows * work.d_model * (4 + 2 * work.moment_bytes)


def copy_bytes(work: Work, room_bytes: float) -> float:
    """Return the size of a checkpoint's copy in host memory; see `sae_core.checkpoint.host_copy`.

    Args:
        work: The rank's work.
        room_bytes: Memory that a rank's host has left when it saves.
    """
    whole = saved_bytes(work)
    if not work.asynchronous_save:
        return min(whole, FEWEST_BLOCKS * BLOCK_BYTES) if work.on_gpu else 0
    block = min(BLOCK_BYTES, whole)
    return min(whole, block * blocks_for(int(whole), int(block), room_bytes))


def blocking_bytes(work: Work, copied_bytes: float) -> float:
    """Return how much of a checkpoint must be written before training continues.

    Args:
        work: The rank's work.
        copied_bytes: Size of the copy in host memory.
    """
    whole = saved_bytes(work)
    return max(0.0, whole - copied_bytes) if work.asynchronous_save else whole


def _batch_bytes(work: Work) -> float:
    """Return the bytes of the [B, D] arrays that a CPU rank keeps until the update."""
    # Four arrays with all rows (x, centred x, recon, error) and two with the auxiliary loss's rows.
    own = work.d_model * 4 * (work.rows * 4 + work.aux_rows * 2)
    raw = work.row_bytes * work.rows
    gathered: float = 2 * work.gathered_rows * work.d_model * work.gather_bytes
    if work.fused and work.data > 1:  # this replica's own part, in addition to the gathered whole
        gathered += gathered / work.data
    return own + raw + gathered + work.update_pairs * _PAIR_BYTES


def _map_bytes(work: Work) -> float:
    """Return the bytes of the map of the inputs, and of a batch's centred and mapped rows."""
    return 4 * (work.map_numbers + 2 * work.rows * work.d_model) if work.map_numbers else 0


def _encode_bytes(work: Work) -> float:
    """Return the bytes of a CPU encoder product's inputs and outputs, excluding the batch."""
    depth, item = {"bfloat16x3": (3, 2), "bfloat16": (1, 2)}.get(work.prefilter, (1, 4))
    piece = min(work.shard, max(2048, PIECE_ELEMENTS // work.rows))
    weights = piece * work.d_model * depth * item if work.prefilter != "none" else 0
    inputs = work.rows * work.d_model * depth * item if work.prefilter != "none" else 0
    dead = work.dead * work.d_model * 4
    return _SELECT_COPIES * piece * work.rows * item + _PACKED_COPIES * weights + inputs + dead


def _update_bytes(work: Work) -> float:
    """Return the bytes of the stock update's temporaries: summed row gradients."""
    return work.used * (2 * work.d_model + 1) * 4


def _bucket_bytes(work: Work) -> float:
    """Return the bytes of the flat copy in which DeepSpeed reduces dense gradients under ZeRO 0.

    A bucket is full once its tensors exceed the limit, so it may exceed it by the last of them.
    """
    if work.fused or work.zero_stage or work.data == 1:
        return 0
    return 4 * min(work.parameters, _ZERO_BUCKET + work.matrix)


def _zero_bytes(work: Work) -> float:
    """Return the bytes that ZeRO 1 adds: master weights, gradients and the reduce bucket."""
    if not work.zero_stage:
        return 0
    bucket = 4 * _ZERO_BUCKET
    if not work.on_gpu:  # the OS allocates host memory only when it is first touched
        bucket = min(bucket, 4 * work.parameters)
    # Master weights of the rank's part, and two copies of the part's gradients: collected and
    # flattened.
    return 3 * 4 * work.parameters / work.data + bucket


def _held_later(work: Work) -> float:
    """Return the bytes that the first step allocates, after the calibration sample is freed."""
    moments = 2 * work.moment_bytes * work.parameters / (work.data if work.zero_stage else 1)
    return moments + (0 if work.fused else 4 * work.parameters)
