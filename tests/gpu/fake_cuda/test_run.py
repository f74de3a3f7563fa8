"""Test what a CUDA run does besides its steps, on a fake CUDA device."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from tests.support.fake_cuda.expected import EXCEPTIONS

PARTS = "tests.support.fake_cuda.parts"
UPLOAD = "sae_core/training/upload.py: Uploader._wait_for_last: Event.synchronize"


def test_calibration_waits_once_an_iteration(fake_cuda, tmp_path):
    record = fake_cuda.run(f"{PARTS}:calibrate", folder=str(tmp_path))
    assert record.wait_keys - EXCEPTIONS.keys() == {
        # Once a run: the sample, its report, its check, and whether the median has converged.
        "sae_core/training/input_transform.py: report_of: item",
        "sae_core/training/shared_source.py: SharedSource.sample: copy to device",
        "sae_core/training/calibrate.py: _require_spread: item",
        "sae_core/training/calibrate.py: geometric_median: item",
    }
    # The fake device counts each of the two values of `tolist`.
    assert sum(wait.at.function == "_require_spread" for wait in record.waits.elements()) == 2


def test_only_reports_wait_for_metrics(fake_cuda, tmp_path):
    records = fake_cuda.run(f"{PARTS}:report", folder=str(tmp_path))
    assert not records["add"].waits and records["add"].operators
    assert records["reduce"].wait_keys == {
        "sae_core/training/trainer.py: Trainer._raise_if_bad: item",
        "sae_core/engine/deepspeed_engine.py: SAEEngine.lr: item",
        "sae_core/training/step_metrics.py: StepMetrics.reduce: copy to host",
        "sae_core/training/step_metrics.py: StepMetrics.reduce: item",
    }


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_batches_are_gathered_on_the_device_without_a_wait(fake_cuda, tmp_path, codec):
    found = fake_cuda.run(f"{PARTS}:gather", folder=str(tmp_path), codec=codec)
    assert sum(found["blocks"]) >= 3
    for record, uploads in zip(found["records"], found["blocks"], strict=True):
        assert record.wait_keys <= ({UPLOAD} if uploads else set())
        assert not record.races
        assert ("aten.record_stream.default" in record.operators) == bool(uploads)
    assert found["dtype"] == ("torch.bfloat16" if codec == "none" else "torch.float32")


def test_blocks_in_pageable_memory_make_the_host_wait(fake_cuda, tmp_path):
    found = fake_cuda.run(f"{PARTS}:gather", folder=str(tmp_path), pinned=False)
    assert found["blocks"][0] == 1
    (wait,) = found["records"][0].waits
    assert wait.key == "sae_core/training/upload.py: Uploader.upload: copy to device"
    assert found["records"][0].waits[wait] == 2  # the rows and their order


@pytest.mark.parametrize("part", ["host_gather", "mixture", "shared_gather"])
def test_batches_gathered_on_the_host_or_in_parts_do_not_wait(fake_cuda, tmp_path, part):
    record = fake_cuda.run(f"{PARTS}:{part}", folder=str(tmp_path))
    assert record.wait_keys <= {UPLOAD} and not record.races
    assert record.operators or record.collectives


def test_a_checkpoint_is_staged_with_one_wait_a_block(fake_cuda, tmp_path):
    found = fake_cuda.run(f"{PARTS}:staging", folder=str(tmp_path))
    assert found["record"].waits.total() == found["n_blocks"]
    assert found["record"].wait_keys == {
        "sae_core/checkpoint/host_copy.py: HostCopy._pass: Stream.synchronize"
    }
    assert {"sae.W_enc", "sae.W_dec.exp_avg_sq"} <= set(found["names"])


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_run_with_16_bit_copies_resumes(fake_cuda, tmp_path, moments):
    optim = {"moments": moments}
    buffers = fake_cuda.run(f"{PARTS}:resume", folder=str(tmp_path), optim=optim)
    assert "W_enc_copy" in buffers


def test_a_trained_sae_runs_on_the_device(fake_cuda, tmp_path):
    records = fake_cuda.run(f"{PARTS}:inference", folder=str(tmp_path))
    assert all(record.operators for record in records.values())


def test_an_evaluation_runs_on_the_device(fake_cuda, tmp_path):
    record = fake_cuda.run(f"{PARTS}:spliced", folder=str(tmp_path))
    assert record.operators["aten.mm.default"] or record.operators["aten.addmm.default"]


def test_the_benchmark_of_graphs_captures_its_steps(fake_cuda, tmp_path):
    found = fake_cuda.run(f"{PARTS}:captured_runs", folder=str(tmp_path))
    captured = {name: is_captured for name, (is_captured, _) in found.items()}
    assert captured == {"EagerEngineRun": False, "EngineRun": True, "CapturedPlainRun": True}
    for name, (is_captured, record) in found.items():
        assert (not record.launches) == is_captured, name
        assert not record.waits and not record.races
