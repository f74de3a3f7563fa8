"""Test the whole training step of default CUDA runs, at full size, on a fake CUDA device.

The engine, DeepSpeed, autograd and the optimiser are real. Nothing is computed: these tests show
which operations, kernels and waits a step consists of.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from benchmarks.kernel_configurations import configurations
from tests.support.fake_cuda.expected import EXCEPTIONS
from tests.support.fake_cuda.launches import covered_by, why_uncovered
from tests.support.fake_cuda.step_state import STATE

SUPPORT = "tests.support.fake_cuda.cases"
UPLOAD = "sae_core/training/upload.py: Uploader._wait_for_last: Event.synchronize"
L_131K, L_1M = 131072, 1 << 20
NO_AUXK = {"auxk_coef": 0.0}
SHARDED = {"latent": 2, "data": 2}
CASES: dict[str, dict[str, Any]] = {
    "131k": {},
    "131k, no AuxK": {"sae": NO_AUXK},
    "131k, AuxK on an eighth of the rows": {"sae": {"auxk_rows": 0.125}},
    "131k, no clipping": {"optim": {"clip_norm": 0.0}},
    "131k, bfloat16 moments": {"optim": {"moments": "bfloat16"}},
    "131k, float8 prefilter": {"train": {"prefilter": "float8"}},
    "131k, dense update": {"sae": NO_AUXK, "optim": {"update": "dense"}},
    "131k x 768": {"d_model": 768, "sae": {"k": 32}},
    "131k, tf32": {"train": {"compute_dtype": "tf32"}},
    "131k, float32": {"train": {"compute_dtype": "float32"}},
    "131k x 1000": {"d_model": 1000},
    "131k x 8192": {"d_model": 8192},
    "131k, k=33": {"sae": {"k": 33}},
    "131k, k=1": {"sae": {"k": 1}},
    "131k x 1000, float8 prefilter": {"d_model": 1000, "train": {"prefilter": "float8"}},
    "131k x 768, float8 prefilter": {"d_model": 768, "train": {"prefilter": "float8"}},
    "131k, wide descriptors": {"few": 3},
    "131k, persistent": {"few": 5},
    "131k, float8 prefilter with descriptors": {"few": 2, "train": {"prefilter": "float8"}},
    "1M": {"sae": {"n_latents": L_1M}},
    "1M, bfloat16 moments, no clipping, no AuxK": {
        "sae": {"n_latents": L_1M, **NO_AUXK},
        "optim": {"clip_norm": 0.0, "moments": "bfloat16"},
    },
    "1M, float8 prefilter": {"sae": {"n_latents": L_1M}, "train": {"prefilter": "float8"}},
    "131k, first of 2 x 2 ranks": {"sae": NO_AUXK, **SHARDED},
    "131k, last of 2 x 2 ranks": {"sae": NO_AUXK, **SHARDED, "rank": 3},
    "131k, 2 latent shards": {"latent": 2, "rank": 1},
    "100,003, 2 latent shards": {"sae": {"n_latents": 100003}, "latent": 2, "rank": 1},
}


@pytest.fixture(scope="module")
def step_record(fake_cuda, tmp_path_factory):
    """Return a function that runs a case once and returns its record."""

    @cache
    def run(name):
        folder = str(tmp_path_factory.mktemp("step"))
        return fake_cuda.run(f"{SUPPORT}:step", folder=folder, **CASES[name])

    return run


@cache
def _compiled():
    return [covered_by(each) for each in configurations()]


@pytest.mark.parametrize("name", CASES)
def test_the_host_does_not_wait_in_a_step(step_record, name):
    record = step_record(name)
    assert not [str(wait) for wait in record.waits if wait.key not in EXCEPTIONS]
    assert record.launches and not record.races


@pytest.mark.parametrize("name", CASES)
def test_sums_have_a_fixed_order(step_record, name):
    assert not {wait.key for wait in step_record(name).atomics}


@pytest.mark.parametrize("name", CASES)
def test_the_compile_report_covers_all_launches(step_record, name):
    reasons = {launch: why_uncovered(launch, _compiled()) for launch in step_record(name).launches}
    assert not [f"{launch}: {reason}" for launch, reason in reasons.items() if reason is not None]


def test_the_default_step_is_captured_and_replayed(fake_cuda, tmp_path):
    steps = fake_cuda.run(f"{SUPPORT}:graph", folder=str(tmp_path))["steps"]
    eager, captured, *replayed = steps
    assert captured.launches == eager.launches
    assert not eager.operators["cuda_graph.replay"]
    assert [step.operators["cuda_graph.replay"] for step in (captured, *replayed)] == [1, 1, 1]
    for step in replayed:
        assert not step.launches
        # What is left: the batch, the learning rate, the index of the step and the metrics.
        assert step.operators.total() < 40 < eager.operators.total()
        assert step.wait_keys <= {UPLOAD}
    assert not any(step.races for step in steps)


def test_a_step_updates_its_state_in_place(fake_cuda, tmp_path):
    found = fake_cuda.run(f"{SUPPORT}:graph", folder=str(tmp_path))
    assert found["state"] >= {*STATE, "engine._lr", "sae.W_enc_copy"} and not found["moved"]


@pytest.mark.parametrize("name", ["optimizer._global_grad_norm", "W_enc.step", "engine._lr"])
def test_state_in_other_memory_is_found(fake_cuda, tmp_path, name):
    found = fake_cuda.run(f"{SUPPORT}:graph", folder=str(tmp_path), rebound=name)
    assert name in found["moved"]


def test_every_exception_is_still_reported(step_record):
    """Otherwise delete its entry in `tests/support/fake_cuda/expected.py`."""
    waits = set().union(*(step_record(name).wait_keys for name in CASES))
    assert waits >= EXCEPTIONS.keys()
