"""The choice of `train.prefilter=auto` at the start of a run, and after a resume."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist

from sae_core.architectures.base import SparseAutoencoder
from sae_core.distributed.mesh import row_range
from sae_core.distributed.ranks import exchange_device, is_rank_zero
from sae_core.kernels.prefilter_choice import NO_PREFILTER, PrefilterChoice
from sae_core.kernels.prefilter_timing import (
    PrefilteringKernels,
    choose_prefilter,
    processor_name,
)


def agree_on_prefilter(
    sae: SparseAutoencoder, names: Sequence[str], n_rows: int, kept: PrefilterChoice | None
) -> PrefilterChoice | None:
    """Choose the prefilter by time and make the SAE's kernels use it; collective over all ranks.

    All ranks time the candidates at once, as they will train, and take the candidate whose slowest
    rank is the fastest. A saved choice is reused without timing. The choice is repeated, with a
    warning, if the saved one is no longer a candidate, or was made on other processors, which round
    sums differently anyway.

    Args:
        sae: Shard of this rank, on its device.
        names: Candidates, `none` first; the same on all ranks.
        n_rows: Batch rows of a rank.
        kept: The choice in the checkpoint from which the run resumes.

    Returns:
        The choice, the same on all ranks; None if `none` is the only candidate.
    """
    if len(names) == 1:
        if kept is not None and kept.name != NO_PREFILTER:
            _warn(
                f"prefilter {kept.name} of the checkpoint is not available with this device, "
                "kernels and dtype; using none"
            )
        return None
    kernels = cast(PrefilteringKernels, sae.kernels)
    processor = " + ".join(sorted(set(_gather(processor_name()))))
    if kept is not None:
        if kept.name in names and kept.processor == processor:
            kernels.use_prefilter(kept.name)
            return kept
        _warn(
            f"prefilter {kept.name} of the checkpoint was chosen on {kept.processor!r}; choosing "
            f"from {', '.join(names)} again on {processor!r}, which may exchange nearly tied "
            "latents; set train.prefilter to fix one"
        )
    return choose_prefilter(
        kernels,
        names,
        sae.W_enc,
        sae.b_enc,
        n_rows,
        # None, a number that depends on the data: no prefilter supports that.
        sae.config.active_latents() or 0,
        largest_shard=row_range(sae.config.n_latents, 0, sae.mesh.n_latent)[1],
        processor=processor,
        agree=_slowest,
    )


def _gather(text: str) -> list[str]:
    """Return the texts of all ranks; collective. The ranks then begin to time at once."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return [text for text in texts if text is not None]


def _slowest(seconds: Sequence[float]) -> list[float]:
    """Return the largest value of each number on any rank; collective."""
    numbers = torch.tensor(seconds, dtype=torch.float64, device=exchange_device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    found: list[float] = numbers.tolist()
    return found


def _warn(message: str) -> None:
    if is_rank_zero():
        warnings.warn(message, stacklevel=3)
