"""Memory of one rank by part, counted from what the code holds at once."""

from __future__ import annotations

from cluster.planning.hardware import Hardware
from cluster.planning.work import Work
from sae_core.kernels.stock_encode import PIECE_ELEMENTS

_SELECT_COPIES = 2
"""Of a piece: the product and what is looked at of it."""
_PACKED_COPIES = 2
"""Of a piece's weights in low precision: ours, and oneDNN's in its own order."""
_PAIR_BYTES = 12 * 8
"""Of an active pair: keys, candidates, row, latent, value, their sorted copies."""
_ZERO_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce bucket, its default; allocated on first use."""
_SAMPLE_COPIES = 4
"""Raw rows, normalised ones, and two of the geometric median's temporaries."""


def device_bytes(work: Work, hardware: Hardware) -> dict[str, float]:
    """What the rank's peak is made of: on the GPU, or in the process that trains on the CPU.

    Args:
        work: the rank's.
        hardware: says what the process holds before.

    Returns:
        `{part: bytes}`; the sum is the peak. The calibration sample, which comes before the first
        step, is in it only by what it exceeds the step.
    """
    zero_share = work.data if work.zero_stage else 1
    loader: float = 3 * (work.buffer_rows + work.rows // work.latent) * work.row_bytes
    if work.on_gpu:  # the block that is used and the next one while it comes
        loader = 0 if work.mixture else 2 * work.buffer_rows * work.stored_row_bytes
    # A sum: on the CPU the allocator keeps the encoder's pieces when the update wants others.
    step = _batch_bytes(work) + _encode_bytes(work) + _update_bytes(work)
    sample = _SAMPLE_COPIES * work.sample_rows * work.d_model * 4
    parts = {
        "process": hardware.process_bytes,
        "weights": 4 * work.parameters,
        "moments": 2 * work.moment_bytes * work.parameters / zero_share,
        "gradients": 0 if work.fused else 4 * work.parameters,
        "low-precision copies": 2 * work.matrix * work.copy_bytes,
        "ZeRO's masters and bucket": _zero_bytes(work),
        "latents' ages": 8 * work.shard,
        "loader": loader,
        "step": max(step, sample - _held_later(work)),
    }
    return {part: size for part, size in parts.items() if size}


def host_bytes(work: Work) -> dict[str, float]:
    """What the rank holds on the host besides: for checkpoints, and on a GPU also for loading.

    The writer puts a file, one matrix's rows, together in memory: that twice.
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
    """[B, D] arrays that live from the encoder to the update."""
    own = work.d_model * 4 * (work.rows * 4 + work.aux_rows * 2)  # x, centred, recon, error; aux
    raw = work.row_bytes * work.rows
    gathered: float = 2 * work.gathered_rows * work.d_model * work.gather_bytes
    if work.fused and work.data > 1:  # this replica's part exists beside all replicas'
        gathered += gathered / work.data
    return own + raw + gathered + work.update_pairs * _PAIR_BYTES


def _encode_bytes(work: Work) -> float:
    """The product's inputs and outputs, on top of the batch."""
    if work.on_gpu:
        pools = work.rows * 8 * (256 + 224)  # the epilogue's room for keys
        dead = 2 * work.dead * work.d_model * work.product_bytes
        return work.rows * work.d_model * work.product_bytes + pools + dead
    depth, item = {"bfloat16x3": (3, 2), "bfloat16": (1, 2)}.get(work.prefilter, (1, 4))
    piece = min(work.shard, max(2048, PIECE_ELEMENTS // work.rows))
    weights = piece * work.d_model * depth * item if work.prefilter != "none" else 0
    inputs = work.rows * work.d_model * depth * item if work.prefilter != "none" else 0
    dead = work.dead * work.d_model * 4
    return _SELECT_COPIES * piece * work.rows * item + _PACKED_COPIES * weights + inputs + dead


def _update_bytes(work: Work) -> float:
    """Summed row gradients of the stock update; Triton's has none."""
    if work.on_gpu:
        return 2 * work.update_pairs / 512 * work.d_model * 4  # scratch rows of hot latents
    return work.used * (2 * work.d_model + 1) * 4


def _zero_bytes(work: Work) -> float:
    if not work.zero_stage:
        return 0
    bucket = 4 * _ZERO_BUCKET
    if not work.on_gpu:  # pages count when they are touched
        bucket = min(bucket, 4 * work.parameters)
    # Masters of the rank's part, and its gradients, flattened and as they were collected.
    return 3 * 4 * work.parameters / work.data + bucket


def _held_later(work: Work) -> float:
    """What the first step allocates and the calibration sample does not stand beside."""
    moments = 2 * work.moment_bytes * work.parameters / (work.data if work.zero_stage else 1)
    return moments + (0 if work.fused else 4 * work.parameters)
