"""Work of one rank in a step: the sizes from which memory, time and traffic are computed.

Shapes: B rows of a replica's batch, l rows of the largest shard, D d_model, N active pairs. An
active pair is a batch row with one of its active latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from activation_store.codecs.registry import CODECS
from activation_store.format.header import DTYPES
from conf.schema.run import RunConfig
from sae_core.config import ParallelConfig
from sae_core.distributed.mesh import row_range

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Work:
    """One rank's share of a step."""

    d_model: int
    """D, width of the activations."""
    n_latents: int
    """Latents of the whole dictionary."""
    rows: int
    """B, batch rows of this rank's replica."""
    shard: int
    """l, latents of this rank's shard."""
    k: int
    """Active latents per row. If their number depends on the data, all latents are counted, which
    is an upper bound."""
    auxk: int
    """Dead latents selected per row, or 0 if there is no auxiliary path or no dead latent."""
    aux_rows: int
    """Rows that take the auxiliary path."""
    dead: int
    """Dead latents of the shard."""
    latent: int
    """Ranks of a latent group."""
    data: int
    """Data replicas."""
    zero_stage: int
    """ZeRO stage, 0 or 1."""
    fused: bool
    """True if the update is the fused one."""
    clip: bool
    """True if gradients are clipped."""
    moment_bytes: int
    """Bytes per element of Adam's moments."""
    copy_bytes: int
    """Bytes of a weight's copy in the kernels' dtype, or 0 if there is no copy."""
    gather_bytes: int
    """Bytes per element of the inputs and errors that are gathered for the row gradients."""
    product_bytes: int
    """Bytes per element of the encoder product's inputs."""
    prefilter: str
    """Prefilter of the encoder, or "none"."""
    row_bytes: int
    """Bytes of a row after decoding."""
    stored_row_bytes: int
    """Bytes of a row as stored."""
    buffer_rows: int
    """Rows of this rank's part of a shuffle block."""
    sample_rows: int
    """Rows of the calibration sample."""
    asynchronous_save: bool
    """True if checkpoints are written while training continues."""
    on_gpu: bool
    """True if the rank trains on a GPU."""
    mixture: bool
    """True if rows come from several stores. Every rank then reads all rows, and the host gathers
    and decodes the rank's own rows."""

    @property
    def host_row_bytes(self) -> int:
        """Bytes of a row, decoded in a mixture, else stored, on a GPU's host and between ranks."""
        return self.row_bytes if self.mixture else self.stored_row_bytes

    @property
    def n_ranks(self) -> int:
        """Number of ranks in the mesh."""
        return self.latent * self.data

    @property
    def parameters(self) -> int:
        """Number of this rank's parameters, in both matrices and both biases."""
        return self.shard * (2 * self.d_model + 1) + self.d_model

    @property
    def matrix(self) -> int:
        """Number of weights in one matrix of the shard."""
        return self.shard * self.d_model

    @property
    def pairs(self) -> int:
        """Active pairs of this rank for its replica's rows, if all shards have equal shares."""
        return -(-(self.rows * self.k + self.aux_rows * self.auxk) // self.latent)

    @property
    def update_pairs(self) -> int:
        """Active pairs that this rank's update sums. If fused, the pairs of all replicas."""
        return self.pairs * (self.data if self.fused else 1)

    @property
    def used(self) -> float:
        """Expected number of latents that occur in at least one of the update's pairs.

        All latents are assumed equally likely, which gives an upper bound.
        """
        return self.shard * -math.expm1(-self.update_pairs / self.shard)

    @property
    def gathered_rows(self) -> int:
        """Rows of inputs (and of errors) that are gathered for the row gradients."""
        own = self.rows + (self.aux_rows if self.auxk else 0)
        return own * (self.data if self.fused else 1)


def work_of(
    config: RunConfig,
    d_model: int,
    *,
    on_gpu: bool,
    prefilter: str = "none",
    parallel: ParallelConfig | None = None,
) -> Work:
    """Return the work of rank 0, whose shard is the largest.

    Args:
        config: Config of the run.
        d_model: Width D of the activations.
        on_gpu: Whether ranks train on GPUs, with Triton's kernels and bfloat16 copies. If False,
            they train with stock torch.
        prefilter: The prefilter that `train.prefilter=auto` selects on the device.
        parallel: Mesh to use instead of the config's.
    """
    sae, optim, train = config.sae, config.optim, config.train
    mesh = parallel or config.parallel
    start, stop = row_range(sae.n_latents, 0, mesh.latent)
    rows = train.batch_tokens // mesh.data
    dead = round((stop - start) * config.plan.dead_fraction)
    aux = sae.auxiliary_path(d_model) if dead > 0 else None
    low = on_gpu and train.compute_dtype in ("auto", "bfloat16")
    triton = on_gpu and train.kernels in ("auto", "triton")
    return Work(
        d_model=d_model,
        n_latents=sae.n_latents,
        rows=rows,
        shard=stop - start,
        k=sae.active_latents() or sae.n_latents,
        auxk=min(aux.latents, dead * mesh.latent) if aux else 0,
        aux_rows=max(1, round(rows * aux.row_share)) if aux else 0,
        dead=dead if aux else 0,
        latent=mesh.latent,
        data=mesh.data,
        zero_stage=mesh.zero_stage,
        fused=optim.fused(mesh.zero_stage, sae.sparse_gradient),
        clip=optim.clip_norm > 0,
        moment_bytes=ITEM_BYTES[optim.moments],
        copy_bytes=2 if low and triton else 0,
        gather_bytes=2 if low and triton else 4,
        product_bytes=2 if low else 4,
        prefilter=prefilter if train.prefilter == "auto" else train.prefilter,
        row_bytes=d_model * ITEM_BYTES[config.store.dtype],
        stored_row_bytes=stored_row_bytes(config, d_model),
        # In a mixture, every rank reads whole blocks.
        buffer_rows=-(-config.store.buffer_tokens // (1 if config.store.mixture else mesh.n_ranks)),
        sample_rows=train.sample_tokens,
        asynchronous_save=config.checkpoint.asynchronous or on_gpu,
        on_gpu=on_gpu,
        mixture=bool(config.store.mixture),
    )


def stored_row_bytes(config: RunConfig, d_model: int) -> int:
    """Return the bytes of one row of one array as stored.

    Compressed chunks are counted as uncompressed, which is an upper bound.
    """
    return CODECS[config.store.codec].row_bytes(DTYPES[config.store.dtype], d_model)
