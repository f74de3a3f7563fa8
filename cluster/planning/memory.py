"""Memory of one rank by part, counted from the arrays that the code holds at once."""

from __future__ import annotations

from cluster.planning.hardware import Hardware
from cluster.planning.work import Work
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
    if work.on_gpu:  # the current block, and the next one while it is uploaded
        loader = 0 if work.mixture else 2 * work.buffer_rows * work.stored_row_bytes
    # Add these instead of taking the maximum. On the CPU, the allocator keeps the encoder's memory,
    # and the update does not reuse it because it needs other sizes.
    step = _batch_bytes(work) + _encode_bytes(work) + _update_bytes(work)
    sample = _SAMPLE_COPIES * work.sample_rows * work.d_model * 4
    parts = {
        "process": hardware.process_bytes,
        "weights": 4 * work.parameters,
        "moments": 2 * work.moment_bytes * work.parameters / zero_share,
        "gradients": 0 if work.fused else 4 * work.parameters,
        "low-precision copies": 2 * work.matrix * work.copy_bytes,
        "ZeRO's masters and bucket": _zero_bytes(work),
        "tokens since fired": 8 * work.shard,
        "loader": loader,
        "step": max(step, sample - _held_later(work)),
    }
    return {part: size for part, size in parts.items() if size}


def host_bytes(work: Work) -> dict[str, float]:
    """Return a rank's other host memory, for checkpoints and GPU loading, as `{part: bytes}`.

    The checkpoint writer assembles each file (the rows of one matrix) in memory, which takes twice
    the file's size.
    """
    rows = -(-work.shard // work.data)
    copies = 2 * rows * work.d_model * (4 + 2 * work.moment_bytes)
    parts = {
        "checkpoint copy": copies if work.asynchronous_save else 0,
        "checkpoint writer": 2 * rows * work.d_model * 4,
        "loader, pinned": 3 * work.buffer_rows * work.host_row_bytes if work.on_gpu else 0,
    }
    return {part: size for part, size in parts.items() if size}


def _batch_bytes(work: Work) -> float:
    """Return the bytes of the [B, D] arrays that are kept from the encoder until the update."""
    # Four arrays with all rows (x, centred x, recon, error) and two with the auxiliary loss's rows.
    own = work.d_model * 4 * (work.rows * 4 + work.aux_rows * 2)
    raw = work.row_bytes * work.rows
    gathered: float = 2 * work.gathered_rows * work.d_model * work.gather_bytes
    if work.fused and work.data > 1:  # this replica's own part, in addition to the gathered whole
        gathered += gathered / work.data
    return own + raw + gathered + work.update_pairs * _PAIR_BYTES


def _encode_bytes(work: Work) -> float:
    """Return the bytes of the encoder product's inputs and outputs, excluding the batch."""
    if work.on_gpu:
        pools = work.rows * 8 * (256 + 224)  # buffers in which the kernel's epilogue collects keys
        dead = 2 * work.dead * work.d_model * work.product_bytes
        return work.rows * work.d_model * work.product_bytes + pools + dead
    depth, item = {"bfloat16x3": (3, 2), "bfloat16": (1, 2)}.get(work.prefilter, (1, 4))
    piece = min(work.shard, max(2048, PIECE_ELEMENTS // work.rows))
    weights = piece * work.d_model * depth * item if work.prefilter != "none" else 0
    inputs = work.rows * work.d_model * depth * item if work.prefilter != "none" else 0
    dead = work.dead * work.d_model * 4
    return _SELECT_COPIES * piece * work.rows * item + _PACKED_COPIES * weights + inputs + dead


def _update_bytes(work: Work) -> float:
    """Return the bytes of the update's temporaries.

    The stock update holds summed row gradients. Triton's update has only scratch rows for latents
    with many pairs.
    """
    if work.on_gpu:
        return 2 * work.update_pairs / 512 * work.d_model * 4
    return work.used * (2 * work.d_model + 1) * 4


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
