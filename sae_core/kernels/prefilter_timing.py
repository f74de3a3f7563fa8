"""Choose a prefilter by time: encode with each candidate, on slices of the run's own dictionary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from foundation.errors import ConfigError
from sae_core.kernels.interface import Kernels
from sae_core.kernels.prefilter import is_prefiltered
from sae_core.kernels.prefilter_choice import NO_PREFILTER, PrefilterChoice, fastest

_BUDGET_S = 0.6
"""Target time for all timed calls. A slow machine exceeds it: the small slice is always encoded
twice with each candidate. The large one is skipped once this time has passed."""
_SMALL_SHARE = 0.25
"""Share of the target time for the small slice."""
_ROUNDS = 3
"""Maximum number of timed calls of a candidate on each slice, of which the fastest counts."""
_SLICE = 2048
"""Latents in the small slice: enough for an efficient product."""
_MOST_ROWS, _FEWEST_ROWS = 4096, 256
"""Limits on the number of rows that are timed; with fewer, products are inefficient."""
_SLICE_PRODUCTS = 1 << 31
"""Multiplications in the product of the small slice above which fewer rows are timed."""
_SMALL_PRODUCTS = 1 << 24
"""Multiplications in the whole product below which nothing is timed. Such an encoding takes about a
millisecond, mostly for starting operations, of which a prefilter needs more."""


class PrefilteringKernels(Kernels, Protocol):
    """Kernels with prefilters that `train.prefilter=auto` may choose."""

    def use_prefilter(self, name: str) -> None:
        """Encode with the prefilter of this name from now on; `none` means the full product.

        Raises:
            ConfigError: If there is no such prefilter, or this machine does not support it.
        """
        ...


def processor_name() -> str:
    """Return the name of this machine's processor, with its instructions for bfloat16 products."""
    found = torch.cpu.get_capabilities()
    features = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if found.get(name)]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        features.append("onednn_bf16")
    return " ".join([str(found.get("cpu_name", found.get("architecture", "unknown"))), *features])


@torch.no_grad()
def choose_prefilter(
    kernels: PrefilteringKernels,
    names: Sequence[str],
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    n_rows: int,
    k: int,
    *,
    largest_shard: int | None = None,
    processor: str | None = None,
    agree: Callable[[list[float]], list[float]] = list,
) -> PrefilterChoice:
    """Choose the prefilter with which a step encodes fastest, and make the kernels use it.

    The choice depends on times, so two new runs may choose differently. They then may exchange
    latents whose pre-activations are equal up to the rounding of float32 sums.

    Args:
        kernels: Kernels whose `use_prefilter` takes these names.
        names: Candidates, `none` first; the same on all ranks.
        W_enc: [L, D] dictionary rows of this rank.
        b_enc: [L].
        n_rows: Rows that this rank encodes in a step.
        k: Latents selected per row.
        largest_shard: Latents of the largest shard; None means L. It determines whether anything is
            timed, which must be the same on all ranks.
        processor: Description of all ranks' processors; None means that of this one.
        agree: Replaces this rank's times, one for each name, by those that all ranks use.
    """
    L, D = W_enc.shape
    largest = L if largest_shard is None else largest_shard
    seconds: dict[str, float] = {}
    if len(names) > 1 and is_prefiltered(largest, k) and n_rows * largest * D >= _SMALL_PRODUCTS:
        own = time_prefilters(kernels, names, W_enc, b_enc, n_rows, min(k, L))
        agreed = dict(zip(names, agree([own[name] for name in names]), strict=True))
        seconds = {name: value for name, value in agreed.items() if math.isfinite(value)}
    chosen = fastest(seconds) if seconds else NO_PREFILTER
    kernels.use_prefilter(chosen)
    threads = torch.get_num_threads()
    return PrefilterChoice(
        chosen, processor or processor_name(), seconds, n_rows, largest, D, k, threads
    )


def time_prefilters(
    kernels: PrefilteringKernels,
    names: Sequence[str],
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    n_rows: int,
    k: int,
) -> dict[str, float]:
    """Predict the time in seconds that encoding a batch takes with each prefilter.

    Normally distributed rows are encoded with a small and a large slice of the dictionary. The time
    is linear in the number of latents, with a constant part for rescoring. The candidates take
    turns, each time on other latents, so that none finds its weights in the cache.

    Of a larger batch only 4,096 rows are timed, and fewer if D is above 256. The cost of splitting
    the weights is then spread over fewer rows than in training, which favours the full product by a
    few percent at most.

    Returns:
        Seconds by name; infinity for a prefilter that this machine does not support. The kernels
        are left with any of the candidates.
    """
    began = time.perf_counter()
    L = W_enc.shape[0]
    small = min(L, max(_SLICE, 8 * k))
    timer = _Timer(kernels, W_enc, b_enc, min(n_rows, _rows_to_time(small, W_enc.shape[1])), k)
    usable = [name for name in names if timer.supports(name)]
    for name in usable:
        timer.encode(name, small)  # the first call generates code and touches new memory
    short = timer.fastest(usable, small, _SMALL_SHARE * _BUDGET_S)
    left_s = (1 - _SMALL_SHARE) * _BUDGET_S
    affordable = int(small * left_s / (_ROUNDS * sum(short.values())))
    large = min(L, max(affordable, 2 * small))
    if large == small or time.perf_counter() - began > _BUDGET_S:
        whole = {name: short[name] * L / small for name in usable}
    else:
        long = timer.fastest(usable, large, left_s)
        more = (L - large) / (large - small)
        whole = {
            # At least half of the time grows with the latents, however noisy the measured times
            # are.
            name: t + more * max(t - short[name], t * (1 - small / large) / 2)
            for name, t in long.items()
        }
    scale = n_rows / timer.n_rows
    return {name: scale * whole.get(name, math.inf) for name in names}


def _rows_to_time(n_latents: int, d_model: int) -> int:
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _SLICE_PRODUCTS // (n_latents * d_model)))


class _Timer:
    """Times encodings of one batch with slices of a dictionary, which move on with every call."""

    def __init__(
        self,
        kernels: PrefilteringKernels,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        n_rows: int,
        k: int,
    ) -> None:
        self.n_rows = n_rows
        self._kernels = kernels
        self._W_enc = W_enc
        self._b_enc = b_enc
        self._k = k
        # A separate generator: choosing must not change the run's random numbers.
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(n_rows, W_enc.shape[1], generator=generator).to(W_enc.device)
        self._start = 0

    def supports(self, name: str) -> bool:
        """Return True if this machine supports the prefilter."""
        try:
            self._kernels.use_prefilter(name)
        except ConfigError:
            return False
        return True

    def encode(self, name: str, n_latents: int) -> float:
        """Encode with a prefilter and the next slice of latents; return the seconds it took."""
        start = self._start if self._start + n_latents <= len(self._W_enc) else 0
        self._start = start + n_latents
        part = slice(start, self._start)
        self._kernels.use_prefilter(name)
        began = time.perf_counter()
        self._kernels.encode_topk(self._x, self._W_enc[part], self._b_enc[part], self._k)
        return time.perf_counter() - began

    def fastest(self, names: Sequence[str], n_latents: int, budget_s: float) -> dict[str, float]:
        """Return each candidate's fastest time, over as many rounds as fit the budget."""
        best = dict.fromkeys(names, math.inf)
        began = time.perf_counter()
        for turn in range(_ROUNDS):
            for name in reversed(names) if turn % 2 else names:
                best[name] = min(best[name], self.encode(name, n_latents))
            if (time.perf_counter() - began) * (turn + 2) / (turn + 1) > budget_s:
                break
        return best
