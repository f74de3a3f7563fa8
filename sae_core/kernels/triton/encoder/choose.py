"""Choose the encoder's candidate by timing, and save the choice in the user's cache folder.

Selected sets are equal whichever candidate wins, so ranks choose on their own and may differ. That
the selected values are equal bit for bit, too, is expected but has not been verified on hardware;
the saved choice makes later runs on the same kind of GPU use the same kernel.
"""

# Triton ships no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton

from foundation.atomic_files import read_json, write_json
from foundation.errors import ConfigError
from foundation.typed_json import from_json
from sae_core.kernels.keys import pool_width
from sae_core.kernels.triton.encoder.candidates import Candidate, candidates
from sae_core.kernels.triton.encoder.encode import Encoder, Factors, Pools, plain_rows
from sae_core.kernels.triton.prefilter_float8 import SLOTS, SplitRows, side_width
from sae_core.kernels.triton.quantise import FP8

SWITCH = "LATENT_FOUNDRY_TIME_ENCODER"
"""Environment variable; 0 uses the default candidate without timing or reading earlier choices."""
BUDGET_S = 40.0
"""Begin no further candidate after this time; one takes at most a few seconds to compile."""
_ROWS, _LATENTS = 8192, 16384
"""Largest slice that is timed: at least 15 waves of the largest tiles on an H100."""
_SAMPLES, _LAUNCHES = 7, 3
"""Samples per candidate and pass, and launches per sample."""
_LONGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Case:
    """Everything that a choice depends on."""

    gpu: str
    torch: str
    triton: str
    dtype: str
    precision: str
    n_rows: int
    n_latents: int
    d_model: int
    k: int


@dataclass(frozen=True)
class Choice:
    """Content of a file in the cache folder."""

    case: dict[str, Any]
    """Fields of the `Case`."""
    candidate: str
    """Label of the fastest candidate."""
    times_ms: dict[str, float]
    """Milliseconds per launch of each candidate that ran, by label."""


def choose(encoder: Encoder, n_rows: int, n_latents: int, d_model: int, k: int) -> Candidate:
    """Return the fastest candidate for an encoder on the current CUDA device.

    The first call for a case takes under a minute, most of it for compilation, and at d_model
    4096 about 0.5 GiB of device memory, which is freed again.

    Args:
        encoder: Its dtype and precision are used, and its candidate if nothing is timed.
        n_rows: Batch rows per step on this rank.
        n_latents: Latents of this rank's shard.
        d_model: Columns of x and W_enc.
        k: Number of latents to select per row.

    Raises:
        ConfigError: If the environment variable `SWITCH` is neither 0 nor 1.
    """
    if not timing_enabled() or not _has_few(encoder.tiles.few, n_latents, k):
        return encoder.tiles.few
    case = Case(
        torch.cuda.get_device_name(),
        torch.__version__,
        triton.__version__,
        str(encoder.dtype).removeprefix("torch."),
        encoder.precision,
        n_rows,
        n_latents,
        d_model,
        k,
    )
    options = candidates(encoder.dtype, encoder.precision)
    kept = read_choice(case, options)
    if kept is not None:
        return kept
    try:
        timer = FilterTimer(encoder, n_rows, n_latents, d_model, k)
        times_ms = time_all(options, timer)
    except torch.cuda.OutOfMemoryError as error:
        warnings.warn(f"the encoder's candidates were not timed: {error}", stacklevel=2)
        return encoder.tiles.few
    # An error of the device itself, such as an illegal access, must not be mistaken for a candidate
    # that does not run: waiting for the device raises it again.
    torch.cuda.synchronize()
    if not times_ms:
        return encoder.tiles.few
    best = min(options, key=lambda each: times_ms.get(each.label, float("inf")))
    write_choice(case, options, Choice(asdict(case), best.label, times_ms))
    return best


def timing_enabled() -> bool:
    """Return True unless the environment variable `SWITCH` is 0.

    Raises:
        ConfigError: If it is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise ConfigError(SWITCH, value, "0 or 1 in the environment")
    return value == "1"


def _has_few(candidate: Candidate, n_latents: int, k: int) -> bool:
    """Return True if the last segment of `n_latents` latents has few keys per tile."""
    return candidate.most_keys * (n_latents // 4) >= k * candidate.tile.BN


def time_all(
    options: Sequence[Candidate],
    measure: Callable[[Candidate], float],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, float]:
    """Measure all candidates in order and in reverse, and return each one's smaller time by label.

    The order cancels a slow drift of the GPU's clock. Candidates that Triton cannot compile for the
    device are left out, with a warning, and so are those that `BUDGET_S` leaves no time for.
    """
    began = clock()
    times_ms: dict[str, float] = {}
    for each in options:
        if clock() - began > BUDGET_S:
            warnings.warn(f"no time is left to measure {each.label}", stacklevel=2)
            continue
        try:
            times_ms[each.label] = measure(each)
        except (triton.TritonError, RuntimeError) as error:
            warnings.warn(f"{each.label} does not run on this GPU: {error}", stacklevel=2)
    for each in reversed(options):
        if each.label in times_ms and clock() - began <= BUDGET_S:
            times_ms[each.label] = min(times_ms[each.label], measure(each))
    return times_ms


class FilterTimer:
    """Times one launch of `filter_kernel` on random numbers, as in a run's last segment.

    That segment holds three quarters of all latents. A row's k-th value among the latents before it
    is exceeded by a share k / (n_latents / 4) of the segment's values.
    """

    def __init__(
        self,
        encoder: Encoder,
        n_rows: int,
        n_latents: int,
        d_model: int,
        k: int,
        device: str = "cuda",
    ) -> None:
        before = n_latents // 4
        rows, latents = min(n_rows, _ROWS), min(n_latents - before, _LATENTS)
        share = torch.tensor(k / before, dtype=torch.float64)
        limit = float(torch.special.ndtri(1 - share))
        self._encoder = encoder
        # A separate generator: training's random numbers must not depend on what is timed.
        generator = torch.Generator(device).manual_seed(0)
        x = _random_rows(encoder.dtype, rows, d_model, d_model**-0.5, generator)
        W = _random_rows(encoder.dtype, latents, d_model, 1.0, generator)
        self._factors = Factors(x, W, torch.zeros(latents, device=device), None, None)
        self.counts = torch.zeros(rows, dtype=torch.int32, device=device)
        self._pools = Pools(
            torch.empty(rows, pool_width(k), dtype=torch.int64, device=device),
            self.counts,
            torch.full((rows,), limit, device=device),
            torch.zeros_like(self.counts),
        )

    def __call__(self, candidate: Candidate) -> float:
        """Return the median time of a launch, in milliseconds."""
        self.launch(candidate)  # compile it
        torch.cuda.synchronize()
        samples = []
        for _ in range(_SAMPLES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.counts.zero_()
            self.launch(candidate)  # keeps the device busy while the host enqueues the rest
            begin.record()
            for _ in range(_LAUNCHES):
                self.launch(candidate)
            end.record()
            samples.append((begin, end))
        torch.cuda.synchronize()
        return median(begin.elapsed_time(end) for begin, end in samples) / _LAUNCHES

    def launch(self, candidate: Candidate) -> None:
        """Run the kernel once, which adds to `counts`, the number of keys of each row."""
        n_latents = len(self._factors.b)
        self._encoder.filter(candidate, self._factors, 0, n_latents, self._pools)


def _random_rows(
    dtype: torch.dtype, n: int, d_model: int, scale: float, generator: torch.Generator
) -> SplitRows:
    """Return normally distributed rows in the encoder's format, with standard deviation `scale`."""

    def normal(n_columns: int) -> torch.Tensor:
        return torch.randn(n, n_columns, device=generator.device, generator=generator)

    if dtype != FP8:
        return plain_rows(normal(d_model).mul_(scale).to(dtype))
    # As `split_rows` makes them, but without the bounds, which would raise all values.
    n_side = min(side_width(d_model) - SLOTS, d_model // 2)
    low, side = normal(-(-(d_model - n_side) // 16) * 16), normal(side_width(d_model))
    low[:, d_model - n_side :] = 0
    side[:, n_side:] = 0
    scales = torch.full((n,), scale, device=generator.device)
    return SplitRows(low.to(FP8), side.bfloat16(), scales)


def choice_file(case: Case, options: Sequence[Candidate]) -> Path:
    """Return the file that holds the choice among `options`.

    The name changes with the list of candidates, so that an earlier version's choice is not used.

    Raises:
        RuntimeError: If the home folder cannot be determined.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG specification requires
        base = Path.home() / ".cache"
    text = json.dumps([asdict(case), [each.label for each in options]], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return base / "latent-foundry" / "encoder" / f"{name}.json"


def read_choice(case: Case, options: Sequence[Candidate]) -> Candidate | None:
    """Return the saved choice, or None if there is none; warn if its file is damaged."""
    try:
        path = choice_file(case, options)
        choice = from_json(Choice, read_json(path, _LONGEST_FILE))
        if choice.case != asdict(case):
            raise ValueError("it belongs to another case")
        by_label = {each.label: each for each in options}
        if choice.candidate not in by_label:
            raise ValueError(f"candidate={choice.candidate!r:.80}: unknown")
        return by_label[choice.candidate]
    except (FileNotFoundError, RuntimeError):
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"ignoring the encoder's saved choice, {path}: {error}", stacklevel=3)
        return None


def write_choice(case: Case, options: Sequence[Candidate], choice: Choice) -> None:
    """Save a choice; warn if the cache folder cannot be written."""
    try:
        path = choice_file(case, options)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(choice))
    except (OSError, RuntimeError) as error:
        warnings.warn(f"could not save the encoder's choice: {error}", stacklevel=3)
