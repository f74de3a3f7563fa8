"""Test that a trained SAE encodes and decodes alike with the Triton and the stock kernels."""

from __future__ import annotations

import pytest
import torch
import triton

from sae_core.architectures.topk.inference import TopKInference
from sae_core.config import TopKConfig
from sae_core.inference_memory import ShardPlan
from sae_core.kernels.triton.body import TritonKernels
from sae_core.sharded_inference import ShardedSAE

pytestmark = pytest.mark.gpu

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
L, D, K = 700, 32, 8


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Make small integers, whose sums are exact in every dtype, with few ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


def trained() -> TopKInference:
    vectors = integers(L, seed=2), integers(D, seed=3)
    config = TopKConfig(n_latents=L, k=K)
    return TopKInference(config, integers(L, D, seed=0), integers(L, D, seed=1), *vectors)


def test_an_sae_on_a_gpu_uses_the_triton_kernels() -> None:
    sae = trained().to(DEVICE)
    if INTERPRETED:
        sae.kernels = TritonKernels(torch.float32)
    assert sae.kernels.name == "triton"
    x = integers(90, D, seed=4)
    values, indices = sae.encode_topk(x.to(DEVICE))
    expected, expected_indices = trained().encode_topk(x)
    assert torch.equal(values.cpu(), expected)
    assert torch.equal(indices.cpu(), expected_indices)
    assert torch.equal(sae(x.to(DEVICE)).cpu(), trained()(x))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32] + ([] if INTERPRETED else [torch.bfloat16]))
def test_shards_on_a_gpu(dtype: torch.dtype, resident: bool) -> None:
    whole, x = trained(), integers(90, D, seed=4)
    plan = ShardPlan((DEVICE,), 300, resident, 32, 1000)
    sae = ShardedSAE(whole.stored(), plan, TritonKernels(dtype))
    expected, expected_indices = whole.encode_topk(x)
    for device in {DEVICE, torch.device("cpu")}:
        values, indices = sae.encode_topk(x.to(device))
        assert values.device.type == device.type
        assert torch.equal(values.cpu(), expected)
        assert torch.equal(indices.cpu(), expected_indices)
        assert torch.equal(sae.decode_topk(values, indices).cpu(), whole(x))
