"""Work of one rank in a step: the sizes from which memory, time and traffic are computed.

Shapes: B rows of a replica's batch, l rows of the largest shard, D d_model, N active pairs. An
active pair is a batch row with one of its active latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from activation_store.codecs.registry import CODECS
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
    """Dead latents selected per row, or 0 if there is no auxiliary path. If the kernels are not
    asynchronous, at most the number of dead latents."""
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
    asynchronous: bool
    """True if the host never waits for the device in a step. Every row then has slots for all the
    pairs that it may have, and the auxiliary path runs even if no latent is dead."""
    graph: bool
    """True if the step runs as a CUDA graph."""
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
    chunk_rows: int
    """Rows of a chunk of the store."""
    sample_rows: int
    """Rows of the calibration sample."""
    asynchronous_save: bool
    """True if checkpoints are written while training continues."""
    on_gpu: bool
    """True if the rank trains on a GPU."""
    mixture: bool
    """True if rows come from several stores. Every rank then reads all rows, and the host gathers
    and decodes the rank's own rows."""
    map_numbers: int = 0
    """Number of elements in the map of the inputs (`sae.input_transform`); 0 without a map."""

    @property
    def block_rows(self) -> int:
        """Rows for which a block's memory is allocated: whole chunks that cover the rank's part."""
        whole = self.buffer_rows * (1 if self.mixture else self.n_ranks) + self.chunk_rows
        return min(whole, self.buffer_rows + 3 * self.chunk_rows)

    @property
    def device_row_bytes(self) -> int:
        """Bytes of a row of the batch on a GPU; rows that the GPU decodes become float32."""
        decoded_here = not self.mixture and self.stored_row_bytes != self.row_bytes
        return 4 * self.d_model if decoded_here else self.row_bytes

    @property
    def host_row_bytes(self) -> int:
        """Bytes of a row on a GPU's host and between ranks: decoded in a mixture, else stored."""
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
        found = min(self.auxk, self.dead * self.latent)
        return -(-(self.rows * self.k + self.aux_rows * found) // self.latent)

    @property
    def update_pairs(self) -> int:
        """Active pairs that this rank's update sums. If fused, the pairs of all replicas."""
        return self.pairs * (self.data if self.fused else 1)

    @property
    def slots(self) -> int:
        """Slots for the pairs of this rank, some of which are empty, for its replica's rows."""
        if not self.asynchronous:
            return self.pairs
        width, aux_width = min(self.k, self.shard), min(self.auxk, self.shard)
        return self.rows * width + self.aux_rows * aux_width

    @property
    def update_slots(self) -> int:
        """Slots that this rank's update sorts. If fused, the slots of all replicas."""
        return self.slots * (self.data if self.fused else 1)

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
        prefilter: The prefilter that `train.prefilter=auto` chooses; see `expected_prefilter`.
        parallel: Mesh to use instead of the config's.
    """
    optim, train = config.optim, config.train
    sae = config.sae.resolved(d_model, train.batch_tokens, train.tokens)
    mesh = parallel or config.parallel
    start, stop = row_range(sae.n_latents, 0, mesh.latent)
    rows = train.batch_tokens // mesh.data
    dead = round((stop - start) * config.plan.dead_fraction)
    low = on_gpu and train.compute_dtype in ("auto", "bfloat16")
    triton = on_gpu and train.kernels in ("auto", "triton")
    aux = sae.auxiliary_path(d_model) if dead > 0 or triton else None
    most_aux = sae.n_latents if triton else dead * mesh.latent
    fused = optim.fused(mesh.zero_stage, sae.sparse_gradient)
    return Work(
        d_model=d_model,
        n_latents=sae.n_latents,
        rows=rows,
        shard=stop - start,
        k=sae.active_latents() or sae.n_latents,
        auxk=min(aux.latents, most_aux) if aux else 0,
        aux_rows=max(1, round(rows * aux.row_share)) if aux else 0,
        dead=dead if aux else 0,
        latent=mesh.latent,
        data=mesh.data,
        zero_stage=mesh.zero_stage,
        fused=fused,
        asynchronous=triton,
        graph=triton and fused and train.cuda_graph == "auto" and mesh.latent * mesh.data == 1,
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
        chunk_rows=max(1, config.store.chunk_bytes // stored_row_bytes(config, d_model)),
        sample_rows=train.sample_tokens,
        asynchronous_save=config.checkpoint.asynchronous,
        on_gpu=on_gpu,
        mixture=bool(config.store.mixture),
        map_numbers=math.prod(sae.map_shape(d_model) or (0,)),
    )


def stored_row_bytes(config: RunConfig, d_model: int) -> int:
    """Return the bytes of one row of one array as stored.

    Compressed chunks are counted as uncompressed, which is an upper bound.
    """
    if config.store.codec == "none":  # the rows themselves
        return d_model * ITEM_BYTES[config.store.dtype]
    # The store's format needs packages (ml_dtypes, crc32c) that a plan of a step does not.
    from activation_store.format.header import DTYPES

    return CODECS[config.store.codec].row_bytes(DTYPES[config.store.dtype], d_model)
