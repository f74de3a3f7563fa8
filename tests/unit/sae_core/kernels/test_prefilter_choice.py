"""Test that `train.prefilter=auto` chooses by time, and only where a prefilter can run."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from foundation.errors import ConfigError
from sae_core.config import TrainConfig
from sae_core.errors import ShapeError
from sae_core.kernels import get_kernels
from sae_core.kernels.prefilter_choice import PrefilterChoice, candidates, fastest
from sae_core.kernels.prefilter_timing import choose_prefilter, time_prefilters
from sae_core.kernels.registry import KERNELS, REFERENCE, STOCK, TRITON
from sae_core.kernels.stock.prefilter_bfloat16 import Bfloat16Prefilter
from tests.support.toys.prefilter import DELAYED, DelayedKernels

NAMES = ("none", "delayed")
L, D, B, K = 8192, 16, 256, 4
"""A product of 2^25 multiplications, which is enough to be timed."""


def dictionary(n_latents=L):
    return torch.randn(n_latents, D, generator=torch.Generator().manual_seed(1)) / D**0.5


def choose(kernels, n_latents=L, rows=B, k=K, **more):
    W = dictionary(n_latents)
    return choose_prefilter(kernels, NAMES, W, torch.zeros(n_latents), rows, k, **more)


@pytest.mark.parametrize(
    ("full_s", "filter_s", "chosen"), [(0.0, 0.05, "none"), (0.05, 0.0, "delayed")]
)
def test_the_faster_path_is_chosen_and_used(full_s, filter_s, chosen):
    kernels = DelayedKernels(full_s, filter_s)
    choice = choose(kernels)
    assert choice.name == chosen
    assert (kernels.prefilter is None) == (chosen == "none")
    assert set(choice.seconds) == set(NAMES)
    slow = "delayed" if chosen == "none" else "none"
    assert choice.seconds[slow] > 0.05 > choice.seconds[chosen]
    assert (choice.rows, choice.latents, choice.d_model, choice.k) == (B, L, D, K)
    assert "none" in str(choice) and "delayed" in str(choice) and " s with " in str(choice)


def test_selections_are_the_same_whatever_is_chosen():
    W, x = dictionary(), torch.randn(32, D)
    found = []
    for delays in ((0.0, 0.05), (0.05, 0.0)):
        kernels = DelayedKernels(*delays)
        choose(kernels)
        found.append(kernels.encode_topk(x, W, torch.zeros(L), K)[1])
    assert torch.equal(*found)


def test_a_prefilter_that_this_machine_lacks_is_not_chosen():
    kernels = DelayedKernels(0.02, -1.0)
    choice = choose(kernels)
    assert choice.name == "none" and set(choice.seconds) == {"none"}


@pytest.mark.parametrize(
    "sizes",
    [{"rows": 16}, {"k": 300}, {"n_latents": 1000, "rows": 4096, "k": 200}, {"k": 0}],
)
def test_nothing_is_timed_where_a_prefilter_does_not_apply_or_pay(sizes):
    kernels = DelayedKernels(1.0, 1.0)  # one call would take a second
    began = time.monotonic()
    choice = choose(kernels, **sizes)
    assert time.monotonic() - began < 0.5
    assert choice.name == "none" and not choice.seconds
    assert "not timed" in str(choice)


def test_the_largest_shard_decides_whether_anything_is_timed():
    """The last shard may be smaller; it must not be missing from the exchange of times."""
    seen = []

    def agree(times):
        seen.append(times)
        return [1.0, 0.5]

    choice = choose(DelayedKernels(0.0, 0.0), 1000, largest_shard=2 * L, agree=agree)
    assert len(seen) == 1 and choice.name == "delayed"
    assert choice.seconds == {"none": 1.0, "delayed": 0.5}


def test_a_prefilter_must_save_five_percent():
    assert fastest({"none": 1.0, "delayed": 0.94}) == "delayed"
    assert fastest({"none": 1.0, "delayed": 0.96}) == "none"
    assert fastest({"none": 1.0, "delayed": 1.5, "other": 0.9}) == "other"


def test_times_are_predicted_from_slices():
    """Every product of the small and of the large slice takes 1 ms per 1,000 latents."""

    class Linear(DelayedKernels):
        def encode_topk(self, x, W_enc, b_enc, k, among=None):
            lengths.append(len(W_enc))
            rows.append(len(x))
            time.sleep(len(W_enc) * 1e-6 + (0.004 if self.prefilter else 0.0))
            return torch.zeros(len(x), k), torch.zeros(len(x), k, dtype=torch.int64)

    lengths: list[int] = []
    rows: list[int] = []
    W = torch.zeros(1 << 19, 1).expand(-1, 4)
    times = time_prefilters(Linear(0.0, 0.0), NAMES, W, torch.zeros(1 << 19), 8192, 8)
    assert max(lengths) < 1 << 18 and set(rows) == {4096}
    # Twice the rows of a call; 0.52 s and 0.53 s for all latents.
    assert times["none"] == pytest.approx(2 * 0.524, rel=0.25)
    assert times["delayed"] == pytest.approx(2 * 0.528, rel=0.25)


def test_choosing_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    choose(DelayedKernels(0.0, 0.0))
    assert torch.equal(torch.rand(3), expected)


def test_real_prefilters_are_timed_within_a_second():
    kernels: Any = get_kernels("stock", torch.float32)
    W = torch.randn(16384, 64) / 8
    names = candidates(STOCK, "cpu", "float32")
    began = time.monotonic()
    choice = choose_prefilter(kernels, names, W, torch.zeros(16384), 512, 16)
    assert time.monotonic() - began < 5  # under a second where no other process is busy
    assert choice.name in ("none", "bfloat16x3") and choice.seconds["none"] > 0
    assert choice == PrefilterChoice(**vars(choice))


def test_only_proven_prefilters_are_candidates():
    assert candidates(STOCK, "cpu", "float32") == ("none", "bfloat16x3")
    assert candidates(DELAYED, "cpu", "float32") == NAMES
    for body in (REFERENCE, TRITON):
        assert candidates(body, "cuda", "float32") == ("none",)


def test_the_device_decides():
    assert candidates(STOCK, "cuda", "float32") == ("none",)
    assert candidates(STOCK, "cpu", "bfloat16") == ("none",)
    for prefilter in ("bfloat16", "bfloat16x3"):
        config = TrainConfig(kernels="stock", compute_dtype="float32", prefilter=prefilter)
        config.validate()  # the device is not known yet
        with pytest.raises(ConfigError, match=r"set train.prefilter=auto, or train.device=cpu"):
            config.validate_prefilter("cuda")
        config.device = "cuda"
        with pytest.raises(ConfigError, match=r"expected auto or none with train.device=cuda"):
            config.validate()
    TrainConfig(device="cuda", kernels="stock", compute_dtype="float32").validate()


def test_a_prefilter_of_the_cpu_refuses_tensors_of_other_devices():
    x, W = torch.zeros(2, 8, device="meta"), torch.zeros(100, 8, device="meta")
    with pytest.raises(ShapeError, match=r"train.prefilter=none"):
        Bfloat16Prefilter(split=True).candidates(x, W, W[:, 0], 2)


def test_kernels_start_without_a_prefilter():
    for name in ("stock", "reference"):
        with pytest.raises(ConfigError, match=r"train.prefilter='auto'"):
            get_kernels(name, torch.float32, prefilter="auto")
    assert all("auto" not in body.prefilters for _, body in KERNELS.items())
