"""Test that the fake CUDA device finds every fault it is meant to find, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from benchmarks.kernel_configurations import configurations
from tests.support.fake_cuda.faults import MIXING, NOT_WAITING, WAITING
from tests.support.fake_cuda.launches import covered_by, why_uncovered
from tests.support.fake_cuda.process import DeviceError

FAULTS = "tests.support.fake_cuda.faults"
HERE = "tests/support/fake_cuda/faults.py"


@pytest.fixture(scope="module")
def compiled():
    return [covered_by(each) for each in configurations()]


def _why(launch, compiled):
    return why_uncovered(launch, compiled) or ""


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_of_the_host_is_noted_with_its_line(fake_cuda, name):
    record = fake_cuda.run(f"{FAULTS}:waits", name=name)
    assert {wait.what for wait in record.waits} == {WAITING[name][0]}
    assert {wait.at.file for wait in record.waits} == {HERE}
    assert all(wait.at.line > 0 for wait in record.waits)


@pytest.mark.parametrize("name", NOT_WAITING)
def test_other_operations_do_not_wait(fake_cuda, name):
    assert not fake_cuda.run(f"{FAULTS}:waits", name=name).waits


@pytest.mark.parametrize("name", MIXING)
def test_a_tensor_of_the_host_beside_one_of_the_device_raises(fake_cuda, name):
    with pytest.raises(DeviceError) as raised:
        fake_cuda.run(f"{FAULTS}:mixes", name=name)
    assert raised.value.kind == "MixedDevices"
    assert HERE in raised.value.message


def test_a_covered_launch(fake_cuda, compiled):
    (launch,) = fake_cuda.run(f"{FAULTS}:launch").launches
    assert why_uncovered(launch, compiled) is None


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"counts": "int64"}, "counts is '*i64', compiled '*i32'"),
        ({"k": 32, "width": 2048}, "LOG_K is 5, compiled"),
        ({"offset": 1}, "threshold is not a multiple of 16"),
    ],
)
def test_an_uncovered_launch(fake_cuda, compiled, change, reason):
    (launch,) = fake_cuda.run(f"{FAULTS}:launch", **change).launches
    assert reason in _why(launch, compiled)


def test_a_number_above_2_to_the_31_has_another_type(fake_cuda, compiled):
    (launch,) = fake_cuda.run(f"{FAULTS}:large_launch", rows=2**31 - 16).launches
    assert why_uncovered(launch, compiled) is None
    (launch,) = fake_cuda.run(f"{FAULTS}:large_launch", rows=2**31).launches
    assert "B is 'i64', compiled 'i32'" in _why(launch, compiled)


def test_a_number_that_is_1_is_a_constant(fake_cuda, compiled):
    (launch,) = fake_cuda.run(f"{FAULTS}:narrow_launch").launches
    assert "D is None, compiled 'i32'" in _why(launch, compiled)


def test_a_number_that_is_not_specialised_is_no_constant(fake_cuda, compiled):
    (launch,) = fake_cuda.run(f"{FAULTS}:large_launch", rows=1).launches
    assert why_uncovered(launch, compiled) is None


def test_alignment_options_and_constants_are_compared(compiled):
    launch = next(each for each in compiled if each.kernel.endswith("update_kernel"))
    assert why_uncovered(launch, compiled) is None
    aligned = (*launch.aligned, "first_latent")
    assert "first_latent is a multiple" in _why(replace(launch, aligned=aligned), compiled)
    options = tuple((key, 2 if key == "num_stages" else value) for key, value in launch.options)
    assert "num_stages is 2" in _why(replace(launch, options=options), compiled)
    options = tuple((key, value and key != "enable_fp_fusion") for key, value in launch.options)
    assert "enable_fp_fusion" in _why(replace(launch, options=options), compiled)
    constants = tuple((key, 1 if key == "PIECE" else value) for key, value in launch.constants)
    assert "PIECE is 1" in _why(replace(launch, constants=constants), compiled)
    other = replace(launch, kernel="other")
    assert why_uncovered(other, compiled) == "the compile report has no such kernel"


def test_a_launch_with_a_tensor_of_the_host_raises(fake_cuda):
    with pytest.raises(DeviceError, match="a tensor of shape") as raised:
        fake_cuda.run(f"{FAULTS}:launch", on="cpu")
    assert raised.value.kind == "MixedDevices"


def test_unordered_streams_are_a_race(fake_cuda):
    assert fake_cuda.run(f"{FAULTS}:race", ordered=False).races
    assert not fake_cuda.run(f"{FAULTS}:race", ordered=True).races


def test_an_upload_is_ordered_before_its_use(fake_cuda):
    assert fake_cuda.run(f"{FAULTS}:upload", ordered=False).races
    assert not fake_cuda.run(f"{FAULTS}:upload", ordered=True).races


def test_collectives_need_tensors_on_the_device_of_their_group(fake_cuda):
    record = fake_cuda.run(f"{FAULTS}:collective", backend="nccl", on="cuda")
    assert record.collectives == {"allreduce_": 1} and not record.waits
    record = fake_cuda.run(f"{FAULTS}:collective", backend="gloo", on="cuda")
    assert {wait.what for wait in record.waits} == {"allreduce_ of gloo"}
    with pytest.raises(DeviceError, match="cpu"):
        fake_cuda.run(f"{FAULTS}:collective", backend="nccl", on="cpu")


def test_a_wait_in_a_cuda_graph_raises(fake_cuda):
    record = fake_cuda.run(f"{FAULTS}:capture", waiting=False)
    assert record.operators["cuda_graph.replay"] == 1
    with pytest.raises(DeviceError, match="while a CUDA graph is captured") as raised:
        fake_cuda.run(f"{FAULTS}:capture", waiting=True)
    assert raised.value.kind == "CaptureError" and HERE in raised.value.message


def test_sums_in_no_fixed_order_are_noted(fake_cuda):
    (found,) = fake_cuda.run(f"{FAULTS}:atomics").atomics
    assert found.at.file == HERE and "index_add_" in found.what
