"""Compare the counted arrays of a step with the tensors that a step of the Triton body allocates.

The kernels are not run: their launches are replaced, so that only allocations remain.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.planning.step_buffers import gpu_buffers, peak
from cluster.planning.work import Work, work_of
from conf.schema.plan import PlanConfig
from conf.schema.run import RunConfig
from sae_core.config import OptimConfig, TopKConfig, TrainConfig
from tests.support.ranks import Ranks

TOLERANCE = 0.01
"""Largest relative difference between the count and the tensors that torch allocates."""
D = 128
_UNSEEN = ("raw rows", "graph's copy of raw rows", "sort workspace")
"""Buffers that exist before the step, or only inside an operation."""


def _config(case: dict[str, Any]) -> RunConfig:
    sae = TopKConfig(
        n_latents=case["L"],
        k=case["k"],
        auxk=case.get("auxk") or 1,
        auxk_coef=1 / 32 if case.get("auxk") else 0.0,
        auxk_rows=case.get("auxk_rows", 1.0),
        dead_after_tokens=10**6,
    )
    train = TrainConfig(tokens=1000 * case["B"], batch_tokens=case["B"])
    optim = OptimConfig(clip_norm=case.get("clip_norm", 1.0))
    return RunConfig(
        sae=sae, train=train, optim=optim, plan=PlanConfig(hardware="h100", dead_fraction=0.25)
    )


def _work(case: dict[str, Any]) -> Work:
    work = work_of(_config(case), D, on_gpu=True)
    if case.get("float8"):
        work = replace(work, prefilter="float8")
    if case["dtype"] == "float32":
        work = replace(work, product_bytes=4, copy_bytes=0, gather_bytes=4)
    return work


def _measure(case: dict[str, Any], folder: str) -> int:
    """Run a step with inert kernels, and write the bytes and operation of its peak to a file."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import _disable_current_modes

    from sae_core.architectures.registry import build_sae
    from sae_core.distributed.mesh import Mesh
    from sae_core.engine.deepspeed_engine import SAEEngine
    from sae_core.kernels.keys import pack_keys
    from sae_core.kernels.triton import dense, quantise, segments, sparse, update
    from sae_core.kernels.triton.body import TritonKernels
    from sae_core.kernels.triton.encoder import encode, select
    from tests.support.kernels.allocations import Allocations

    class Inert:
        """A kernel that does nothing when it is launched."""

        def __getitem__(self, grid: object) -> Any:
            return lambda *arguments, **options: None

    patched: Any = encode
    names = patched.keys_kernel.arg_names

    class RandomKeys(Inert):
        """`keys_kernel`, with random positive values."""

        def __getitem__(self, grid: object) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                given = dict(zip(names, arguments, strict=False))
                out, n_latents = given["out"], given["n_latents"]
                with _disable_current_modes():
                    latents = torch.stack([torch.randperm(n_latents) for _ in out])
                    out[:, :n_latents] = pack_keys(torch.rand(latents.shape), latents)

            return launch

    for module in (dense, encode, quantise, segments, select, sparse, update):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                setattr(module, name, Inert())
    patched.keys_kernel = RandomKeys()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config, device = _config(case).trainer, torch.device("cpu")
    half = case["dtype"] == "float16"
    dtype = torch.float16 if half else torch.float32
    kernels: Any = TritonKernels(dtype, float8_prefilter=case.get("float8", False))
    # On a GPU both are bfloat16, which the interpreter cannot multiply.
    kernels.gather_dtype = torch.float16 if half else None
    mesh = Mesh.create("cpu", 1, 1)
    engine = SAEEngine("sae", build_sae(config.sae, D, mesh, kernels, 0), config, device)
    engine.moments()
    engine.sae.tokens_since_fired[::4] = 10**9
    raw = torch.randn(case["B"], D).bfloat16()
    with Allocations() as allocations:
        engine.train_step(raw, 0)
    text = f"{allocations.peak_bytes} {allocations.peak_operation}\n"
    for what, n_bytes in sorted(allocations.at_peak.items(), key=lambda item: -item[1]):
        text += f"    {n_bytes:,} {what}\n"
    (Path(folder) / "peak.txt").write_text(text)
    dist.destroy_process_group()
    return 0


CASES = [
    {"L": 4096, "B": 512, "k": 8, "dtype": "float16"},
    {"L": 4096, "B": 512, "k": 8, "dtype": "float32", "clip_norm": 0.0},
    {"L": 4096, "B": 512, "k": 64, "dtype": "float16"},
    {"L": 4096, "B": 512, "k": 8, "auxk": 32, "auxk_rows": 0.25, "dtype": "float16"},
    {"L": 4096, "B": 256, "k": 8, "auxk": 1000, "dtype": "float16"},
    {"L": 4096, "B": 512, "k": 8, "dtype": "float16", "float8": True},
    {"L": 4096, "B": 256, "k": 64, "dtype": "float16", "float8": True},
]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_count_is_what_a_step_allocates(tmp_path, case):
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    ranks = Ranks(tmp_path, 1, _measure, case, str(tmp_path))
    assert ranks.codes() == [0], ranks.logs()
    text = (tmp_path / "peak.txt").read_text()
    measured = int(text.split()[0])
    seen = [buffer for buffer in gpu_buffers(_work(case)) if buffer.what not in _UNSEEN]
    moment, held = peak(seen)
    counted = sum(held.values())
    lines = "\n".join(f"    {n_bytes:,.0f} {what}" for what, n_bytes in held.items())
    assert abs(counted / measured - 1) <= TOLERANCE, (
        f"{counted:,.0f} {moment.name}\n{lines}\n{text}"
    )
