"""What one rank has to do in a step: the sizes that memory, time and traffic are counted from.

Shapes: B rows of a replica's batch, l rows of the largest shard, D d_model, N pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.schema import RunConfig
from sae_core.config import ParallelConfig
from sae_core.initialise import default_auxk
from sae_core.mesh import row_range

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SCALE_BYTES = 4
"""Of a row of codec int8."""


@dataclass(frozen=True)
class Work:
    """One rank's share of a step."""

    d_model: int
    n_latents: int
    rows: int
    """B."""
    shard: int
    """l."""
    k: int
    auxk: int
    """Selected among the dead; 0: the auxiliary loss is off or nothing is dead."""
    aux_rows: int
    dead: int
    """Of the shard."""
    latent: int
    data: int
    zero_stage: int
    fused: bool
    clip: bool
    moment_bytes: int
    copy_bytes: int
    """Of a weight's copy in the kernels' dtype; 0: there is none."""
    gather_bytes: int
    """Of an element of the inputs and errors that the row gradients gather."""
    product_bytes: int
    """Of an element of the product's inputs."""
    prefilter: str
    row_bytes: int
    """Of one row as readers get it."""
    stored_row_bytes: int
    """Of one row as stored."""
    buffer_rows: int
    """Of a block of the shuffle, this rank's part."""
    sample_rows: int
    asynchronous_save: bool
    on_gpu: bool
    mixture: bool
    """Of several stores: every rank reads all rows, and the host gathers and decodes its own."""

    @property
    def host_row_bytes(self) -> int:
        """Of one row as ranks exchange it and a GPU's host holds it: a mixture's is decoded."""
        return self.row_bytes if self.mixture else self.stored_row_bytes

    @property
    def n_ranks(self) -> int:
        """Of the mesh."""
        return self.latent * self.data

    @property
    def parameters(self) -> int:
        """Of this rank: both matrices, both biases."""
        return self.shard * (2 * self.d_model + 1) + self.d_model

    @property
    def matrix(self) -> int:
        """Weights of one matrix of the shard."""
        return self.shard * self.d_model

    @property
    def pairs(self) -> int:
        """Active pairs of this rank on its replica's rows; shards share them evenly in the mean."""
        return -(-(self.rows * self.k + self.aux_rows * self.auxk) // self.latent)

    @property
    def update_pairs(self) -> int:
        """Pairs that this rank's update sums: the fused one gets those of all replicas."""
        return self.pairs * (self.data if self.fused else 1)

    @property
    def used(self) -> float:
        """Latents with at least one of the update's pairs, were all equally likely: the most."""
        return self.shard * -math.expm1(-self.update_pairs / self.shard)

    @property
    def gathered_rows(self) -> int:
        """Inputs (and errors) that the row gradients gather from."""
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
    """The work of rank 0, whose shard is the largest.

    Args:
        config: of the run.
        d_model: D.
        on_gpu: Triton's kernels, bfloat16 copies; else stock torch.
        prefilter: what `train.prefilter=auto` is on that device.
        parallel: another mesh than the config's.
    """
    sae, optim, train = config.sae, config.optim, config.train
    mesh = parallel or config.parallel
    start, stop = row_range(sae.n_latents, 0, mesh.latent)
    rows = train.batch_tokens // mesh.data
    dead = round((stop - start) * config.plan.dead_fraction)
    aux = sae.auxk_coef > 0 and dead > 0
    low = on_gpu and train.compute_dtype in ("auto", "bfloat16")
    triton = on_gpu and train.kernels in ("auto", "triton")
    return Work(
        d_model=d_model,
        n_latents=sae.n_latents,
        rows=rows,
        shard=stop - start,
        k=sae.k,
        auxk=min(sae.auxk or default_auxk(d_model), dead * mesh.latent) if aux else 0,
        aux_rows=max(1, round(rows * sae.auxk_rows)) if aux else 0,
        dead=dead if aux else 0,
        latent=mesh.latent,
        data=mesh.data,
        zero_stage=mesh.zero_stage,
        fused=optim.fused(mesh.zero_stage),
        clip=optim.clip_norm > 0,
        moment_bytes=ITEM_BYTES[optim.moments],
        copy_bytes=2 if low and triton else 0,
        gather_bytes=2 if low and triton else 4,
        product_bytes=2 if low else 4,
        prefilter=prefilter if train.prefilter == "auto" else train.prefilter,
        row_bytes=d_model * ITEM_BYTES[config.store.dtype],
        stored_row_bytes=stored_row_bytes(config, d_model),
        # A mixture's ranks all read whole blocks.
        buffer_rows=-(-config.store.buffer_tokens // (1 if config.store.mixture else mesh.n_ranks)),
        sample_rows=train.sample_tokens,
        asynchronous_save=config.checkpoint.asynchronous or on_gpu,
        on_gpu=on_gpu,
        mixture=bool(config.store.mixture),
    )


def stored_row_bytes(config: RunConfig, d_model: int) -> int:
    """Of one row of one array, as stored; of codec blosc as without, which is the most."""
    if config.store.codec == "int8":
        return d_model + _SCALE_BYTES
    return d_model * ITEM_BYTES[config.store.dtype]
