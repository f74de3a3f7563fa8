"""Test that an SAE in shards gives the results of the whole one, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foundation.errors import ConfigError
from sae_core import SAE, load_sae
from sae_core.architectures.dictionary_init import random_unit_rows
from sae_core.architectures.topk.inference import TopKInference
from sae_core.checkpoint.reshard import reshard_checkpoint
from sae_core.checkpoint.stored_sae import StoredSAE, open_sae
from sae_core.config import TopKConfig
from sae_core.errors import ShapeError
from sae_core.inference_memory import ShardPlan, plan_shards
from sae_core.kernels import get_kernels
from sae_core.sharded_inference import ShardedSAE
from tests.support.toys.architecture import (
    CopyingKernels,
    ToyConfig,
    ToyInference,
    registered_toys,
)
from tests.support.trainer_ranks import Job, SyntheticSource, run_job

CPU = torch.device("cpu")
MIB, GIB = 1 << 20, 1 << 30
L, D, K = 1000, 24, 7


def topk(n_latents: int = L, k: int = K) -> SAE:
    W = random_unit_rows(0, n_latents, D, 0)
    b_enc = torch.randn(n_latents, generator=torch.Generator().manual_seed(1)) / 4
    return TopKInference(TopKConfig(n_latents=n_latents, k=k), W * 2, W, b_enc, torch.arange(D) / D)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(2))


def in_shards(
    stored: StoredSAE, latents: int, resident: bool, n_devices: int = 1, rows: int = 16
) -> ShardedSAE:
    plan = ShardPlan((CPU,) * n_devices, latents, resident, rows, 10**6, block_bytes=1000)
    return ShardedSAE(stored, plan, get_kernels("stock", torch.float32))


def assert_same(sharded: ShardedSAE, whole: SAE, x: torch.Tensor) -> None:
    expected, expected_indices = whole.encode_topk(x)
    values, indices = sharded.encode_topk(x)
    active = expected > 0
    assert torch.equal(values > 0, active) and (values[~active] == 0).all()
    assert torch.equal(indices[active], expected_indices[active])
    torch.testing.assert_close(values, expected)
    recon = sharded.decode_topk(values, indices)
    torch.testing.assert_close(recon, whole.decode_topk(expected, expected_indices))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(("latents", "n_devices"), [(L, 1), (300, 1), (5, 1), (300, 2), (300, 9)])
def test_shards_give_the_latents_of_the_whole(latents: int, n_devices: int, resident: bool) -> None:
    whole = topk()
    sharded = in_shards(whole.stored(), latents, resident, n_devices)
    assert sharded.n_shards == -(-L // latents)
    for x in (inputs(40), inputs(3, 5), inputs(2, 2, 2), inputs(0)):
        assert_same(sharded, whole, x)
    # Few latents are positive, so rows have fewer than k active ones.
    sparse = topk(k=64)
    sparse.b_enc.sub_(2.5)
    active = (sparse.encode_topk(inputs(40))[0] > 0).sum(1)
    assert active.min() < 64
    assert_same(in_shards(sparse.stored(), latents, resident, n_devices), sparse, inputs(40))


def test_ties_between_shards_go_to_the_lowest_latent() -> None:
    W = random_unit_rows(0, 20, D, 0).repeat(10, 1)  # every latent exists ten times
    whole = TopKInference(TopKConfig(n_latents=200, k=5), W, W, torch.zeros(200), torch.zeros(D))
    for latents in (7, 20, 90):
        sharded = in_shards(whole.stored(), latents, resident=False)
        assert torch.equal(sharded.encode_topk(inputs(30))[1], whole.encode_topk(inputs(30))[1])


def test_a_number_of_active_latents_that_depends_on_the_data() -> None:
    with registered_toys():
        W = random_unit_rows(0, 60, D, 0)
        config = ToyConfig(n_latents=60)
        zeros = torch.zeros(60), torch.zeros(D)
        whole = ToyInference(config, W, W, *zeros, threshold=torch.linspace(0, 1, 60))
        sharded = in_shards(whole.stored(), 13, resident=False)
        x = inputs(40)
        values, indices = sharded.encode_topk(x)
        latents = values.new_zeros(40, 60).scatter_add_(1, indices, values)
        torch.testing.assert_close(latents, whole.encode(x))
        torch.testing.assert_close(sharded.decode_topk(values, indices), whole(x))


def test_nan_reaches_the_result_and_a_wrong_width_is_named() -> None:
    sharded = in_shards(topk().stored(), 300, resident=True)
    x = inputs(3)
    x[1, 0] = float("nan")
    values, indices = sharded.encode_topk(x)
    recon = sharded.decode_topk(values, indices)
    assert recon[1].isnan().all() and recon[[0, 2]].isfinite().all()
    with pytest.raises(ShapeError, match=r"\(4, 7\): expected \[..., 24\]"):
        sharded.encode_topk(torch.zeros(4, 7))


def test_the_encoder_is_kept_in_the_dtype_of_the_kernels() -> None:
    class Half(CopyingKernels):
        copy_dtype: torch.dtype | None = torch.bfloat16

    whole = topk()
    plan = ShardPlan((CPU,), 300, False, 16, 16)
    values, indices = ShardedSAE(whole.stored(), plan, Half(torch.bfloat16)).encode_topk(inputs(9))
    rounded = topk()
    rounded.kernels = get_kernels("stock", torch.bfloat16)
    assert torch.equal(indices, rounded.encode_topk(inputs(9))[1])
    assert not torch.equal(values, whole.encode_topk(inputs(9))[0])


def test_reads_are_counted() -> None:
    stored = topk().stored()
    one_matrix = 4 * L * D
    resident = in_shards(stored, L, resident=True)
    streamed = in_shards(stored, 300, resident=False)
    for sae in (resident, streamed):
        sae.decode_topk(*sae.encode_topk(inputs(50)))
    assert resident.read_bytes == streamed.read_bytes == 2 * one_matrix
    streamed.encode_topk(inputs(1))
    resident.encode_topk(inputs(1))
    assert (resident.read_bytes, streamed.read_bytes) == (2 * one_matrix, 3 * one_matrix)


def test_plans_fit_their_limit() -> None:
    small = TopKConfig(n_latents=4096, k=32)
    plan = plan_shards(small, 576, [CPU], GIB)
    assert (plan.resident, plan.shard_latents, plan.batch_rows) == (True, 4096, 2048)
    large = TopKConfig(n_latents=1 << 24, k=64)
    plan = plan_shards(large, 4096, [CPU], 64 * GIB)
    assert not plan.resident and plan.batch_rows == 2048
    assert 4 * 4096 * plan.shard_latents <= 16 * GIB
    assert plan.rows_at_once * (2 * 4 * 4096 + 3 * 12 * 64) <= 32 * GIB
    assert plan.shards(1 << 24)[-1][1] == 1 << 24

    cuda = [torch.device("cuda", i) for i in range(8)]
    million = TopKConfig(n_latents=1 << 20, k=64)
    plan = plan_shards(million, 4096, cuda, 40 * GIB, encoder_itemsize=2)
    assert plan.resident and plan.devices == tuple(cuda[:1])
    plan = plan_shards(million, 4096, cuda, 20 * GIB, encoder_itemsize=2)
    assert plan.resident and plan.devices == tuple(cuda[:2]) and len(plan.shards(1 << 20)) == 2
    plan = plan_shards(large, 4096, cuda, 54 * GIB, encoder_itemsize=2)
    assert plan.resident and len(plan.devices) == 8
    plan = plan_shards(large, 4096, cuda, 40 * GIB, encoder_itemsize=2)
    assert not plan.resident and 4 * 4096 * plan.shard_latents <= 40 * GIB


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_limit_that_is_too_low_is_named(device: str) -> None:
    config = TopKConfig(n_latents=1 << 20, k=64)
    with pytest.raises(ConfigError, match=r"eval.max_memory_gib=0.001: expected at least") as found:
        plan_shards(config, 4096, [torch.device(device)], int(0.001 * GIB))
    needed = float(str(found.value).split("at least ")[1].split(" GiB")[0])
    plan = plan_shards(config, 4096, [torch.device(device)], int(1.01 * needed * GIB))
    assert not plan.resident and plan.rows_at_once >= plan.batch_rows >= 64


@pytest.mark.distributed
def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    run_job(Job(str(tmp_path / "run")))
    newest = tmp_path / "run" / "checkpoints" / "step-00000050"
    several = reshard_checkpoint(newest, tmp_path / "other", 3)
    whole, stored = load_sae(newest), open_sae(several)
    for latents in (250, 64, 30):
        sharded = in_shards(stored, latents, resident=False)
        assert_same(sharded, whole, SyntheticSource(0, 1).rows(10_000))

    # The identity comes from the manifest; it is the same only for the same files.
    assert stored.weights_sha256() == open_sae(several).weights_sha256()
    assert stored.weights_sha256() != replace(stored, digest=None).weights_sha256()
    hashes = [replace(open_sae(path), digest=None).weights_sha256() for path in (newest, several)]
    assert hashes[0] == hashes[1]

    # Training's own counter says which latents are dead.
    after, counter = stored.config.dead_after_tokens, stored.tokens_since_fired
    assert counter is not None and after is not None and after < stored.metadata["tokens"]
    expected = float((counter(0, 250) >= after).double().mean())
    assert stored.dead_fraction() == expected
    longer = replace(stored, config=replace(stored.config, dead_after_tokens=10**6))
    assert longer.dead_fraction() is None  # trained on fewer tokens
    assert whole.stored().dead_fraction() is None


def peak_growth(folder: Path, limit_mib: int | None) -> dict[str, int]:
    """Encode and decode in a new process, with a limit or whole; return what it measured."""
    command = [sys.executable, "-m", "tests.support.sae_memory", str(folder), str(limit_mib or 0)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, int] = json.loads(result.stdout)
    return measured


@pytest.mark.slow
def test_memory_stays_within_the_limit(tmp_path: Path) -> None:
    n_latents, d_model, limit = 65536, 512, 96
    W = random_unit_rows(0, n_latents, d_model, 0)
    zeros = torch.zeros(n_latents), torch.zeros(d_model)
    TopKInference(TopKConfig(n_latents=n_latents, k=16), W, W, *zeros).save(tmp_path)
    whole, streamed = peak_growth(tmp_path, None), peak_growth(tmp_path, limit)
    assert whole["shards"] == 1 and streamed["shards"] > 4
    assert whole["checksum"] == streamed["checksum"]
    assert whole["peak_bytes"] > 2 * n_latents * d_model * 4
    assert streamed["peak_bytes"] < limit * MIB
