"""The choice of `train.prefilter=auto`, and the times behind it. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from foundation.errors import ConfigError
from sae_core.kernels.registry import KernelBody

NO_PREFILTER = "none"
"""Value of `train.prefilter` for the full product."""
_LEAST_GAIN = 0.05
"""Share of the full product's time that a prefilter must save to be chosen.

It covers the error of the times: a wrong choice then costs about as much as it could gain.
"""


@dataclass(frozen=True)
class PrefilterChoice:
    """The prefilter that `train.prefilter=auto` chose; stored in every checkpoint of the run."""

    name: str
    """The prefilter, or none."""
    processor: str
    """Processors of all ranks, as `processor_name` describes them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Predicted time for encoding a rank's batch with each candidate, on the slowest rank.

    Empty if nothing was timed, because no prefilter can pay for itself at this size.
    """
    rows: int = 0
    """Batch rows of a rank."""
    latents: int = 0
    """Latents of a rank."""
    d_model: int = 0
    """Width of the activations."""
    k: int = 0
    """Latents selected per row."""
    threads: int = 0
    """CPU threads of a rank."""

    def __str__(self) -> str:
        """Describe the choice in one line."""
        if not self.seconds:
            return f"prefilter {self.name}: not timed at this size"
        times = ", ".join(f"{value:.3g} s with {name}" for name, value in self.seconds.items())
        return (
            f"prefilter {self.name}: encoding {self.rows} rows of width {self.d_model}, "
            f"{self.latents} latents, k={self.k}, {self.threads} threads takes {times}"
        )


def candidates(body: KernelBody, device_type: str, compute_dtype: str) -> tuple[str, ...]:
    """Return what `train.prefilter=auto` chooses from, `none` first.

    Args:
        body: The kernels.
        device_type: "cpu" or "cuda".
        compute_dtype: Dtype of the product: "float32" or "bfloat16".
    """
    fits = device_type in body.prefilter_devices and compute_dtype in body.prefilter_dtypes
    return (NO_PREFILTER, *(body.timed_prefilters if fits else ()))


def fastest(seconds: dict[str, float]) -> str:
    """Return the candidate to use: the fastest, or none if that saves less than 5%.

    Args:
        seconds: Time with each candidate; includes `none`.
    """
    best = min(seconds, key=seconds.__getitem__)
    enough = seconds[best] <= (1 - _LEAST_GAIN) * seconds[NO_PREFILTER]
    return best if enough else NO_PREFILTER


def check_prefilter(
    prefilter: str, kernels: str, bodies: list[KernelBody], device: str, compute_dtype: str
) -> None:
    """Check that one of the kernel bodies supports a prefilter.

    Args:
        prefilter: A value of `train.prefilter`.
        kernels: The value of `train.kernels`, for the message.
        bodies: The kernels that `kernels` may stand for.
        device: "cpu", "cuda", or "auto" if it is not known yet.
        compute_dtype: The value of `train.compute_dtype`.

    Raises:
        ConfigError: If none of them does.
    """
    if prefilter in ("auto", NO_PREFILTER):
        return
    able = [body for body in bodies if prefilter in body.prefilters]
    if not able:
        names = ["auto", NO_PREFILTER, *(known for body in bodies for known in body.prefilters)]
        raise ConfigError(
            "train.prefilter", prefilter, f"one of {', '.join(names)} with train.kernels={kernels}"
        )
    if device != "auto" and not any(device in body.prefilter_devices for body in able):
        raise ConfigError(
            "train.prefilter",
            prefilter,
            f"auto or none with train.device={device}",
            f"set train.prefilter=auto, or train.device={able[0].prefilter_devices[0]}",
        )
    if compute_dtype != "auto" and not any(compute_dtype in body.prefilter_dtypes for body in able):
        raise ConfigError(
            "train.prefilter", prefilter, f"auto or none with train.compute_dtype={compute_dtype}"
        )
