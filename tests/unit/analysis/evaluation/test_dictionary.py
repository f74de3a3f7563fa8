"""Test which devices, dtype and memory an evaluation uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from analysis.evaluation import dictionary
from analysis.evaluation.dictionary import (
    compute_dtype_of,
    devices_of,
    shard_sae,
)
from conf.schema.eval import EvalConfig
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core.architectures.dictionary_init import random_unit_rows
from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import ParallelConfig, TopKConfig, TrainConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB, GIB = 1 << 20, 1 << 30


def test_cuda_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = RunConfig(train=TrainConfig(device="cuda"))
    with pytest.raises(ConfigError, match=r"train.device='cuda': expected a machine with a CUDA"):
        devices_of(config)
    for device in ("auto", "cpu"):
        assert devices_of(RunConfig(train=TrainConfig(device=device))) == (CPU,)


def test_as_many_gpus_as_training_has_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for ranks, indices in ((1, None), (3, range(3)), (64, range(4))):
        config = RunConfig(parallel=ParallelConfig(latent=ranks))
        expected = (CUDA,) if indices is None else tuple(torch.device("cuda", i) for i in indices)
        assert devices_of(config) == expected
    assert devices_of(RunConfig(train=TrainConfig(device="cpu"))) == (CPU,)


def test_the_dtype_depends_on_the_device_only_with_auto() -> None:
    for name, cpu, cuda in (
        ("auto", torch.float32, torch.bfloat16),
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
    ):
        config = RunConfig(eval=EvalConfig(compute_dtype=name))
        assert (compute_dtype_of(config, CPU), compute_dtype_of(config, CUDA)) == (cpu, cuda)


def test_the_limit_decides_whether_the_sae_is_read_in_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W = random_unit_rows(0, 4096, 64, 0)
    zeros = torch.zeros(4096), torch.zeros(64)
    stored = TopKInference(TopKConfig(n_latents=4096, k=4), W, W, *zeros).stored()
    for limit, resident in ((0.003, False), (1.0, True)):
        config = RunConfig(eval=EvalConfig(max_memory_gib=limit))
        sae = shard_sae(config, stored, (CPU,))
        assert sae.plan.resident is resident and (sae.n_shards == 1) is resident
    for free, resident in ((2 * GIB, True), (100 * MIB, False)):
        monkeypatch.setattr(dictionary, "available_bytes", lambda free=free: free)
        assert shard_sae(RunConfig(), stored, (CPU,)).plan.resident is resident


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"frequency_tokens": 0}, "eval.frequency_tokens=0: expected at least 1, or null"),
        ({"compute_dtype": "tf32"}, "eval.compute_dtype='tf32': expected auto, float32 or bfl"),
        ({"max_memory_gib": 0.0}, "eval.max_memory_gib=0.0: expected more than 0"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        replace(EvalConfig(), **changes).validate()


def test_a_system_that_does_not_report_its_memory_needs_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W = random_unit_rows(0, 64, 8, 0)
    stored = TopKInference(
        TopKConfig(n_latents=64, k=4), W, W, torch.zeros(64), torch.zeros(8)
    ).stored()
    monkeypatch.setattr(dictionary, "available_bytes", lambda: None)
    with pytest.raises(ConfigError, match=r"max_memory_gib=None: expected a number of GiB"):
        shard_sae(RunConfig(), stored, (CPU,))
    assert shard_sae(RunConfig(eval=EvalConfig(max_memory_gib=1.0)), stored, (CPU,)).n_shards == 1


@pytest.mark.parametrize(
    ("evaluated", "trained", "device", "expected"),
    [
        ("auto", "auto", "cuda", torch.bfloat16),
        ("auto", "auto", "cpu", torch.float32),
        ("auto", "float32", "cuda", torch.float32),
        ("auto", "tf32", "cuda", torch.float32),
        ("bfloat16", "float32", "cuda", torch.bfloat16),
    ],
)
def test_the_dtype_is_that_of_training(evaluated, trained, device, expected) -> None:
    config = RunConfig(eval=EvalConfig(compute_dtype=evaluated))
    config.train.compute_dtype = trained
    assert compute_dtype_of(config, torch.device(device)) == expected
