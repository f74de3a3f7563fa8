"""Test that the Triton kernels compile for Hopper, do not spill and use the tensor cores."""

from __future__ import annotations

import json
import os

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from benchmarks import compile_report
from benchmarks.kernel_configurations import configurations
from sae_core.kernels.triton.encoder.candidates import candidates
from sae_core.kernels.triton.encoder.epilogue import PACK

CONFIGURATIONS = {each.name: each for each in configurations()}
RESULT = ROOT / compile_report.RESULT


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_compiles_without_spills_and_with_the_expected_instructions(name):
    row = compile_report.compile_one(CONFIGURATIONS[name])
    print(compile_report.format_row(row))
    assert not compile_report.spills(row), compile_report.format_row(row)
    products = {kind for kind in row["instructions"] if kind.endswith("GMMA")}
    assert products == set(CONFIGURATIONS[name].matrix.split())
    assert row["programs_per_sm"] * row["num_warps"] >= 8  # two warps per scheduler
    # Add the bias (float8: also scale), compare, a share of a group's vote and branch, and one of
    # what comes once per tile. A thread of the float8 candidate with 8 warps divides the latter
    # among 64 values, not 128.
    most = 7.5 if "fp8" in name and "8w" in name else 5.5 if "fp8" in name else 4.0
    options = CONFIGURATIONS[name].sizes
    counted = options.get("EPILOGUE") == "inline" and not options["PERSISTENT"] and products
    assert ("slots_per_miss" in row) == bool(counted)
    assert row.get("slots_per_miss", 0) < most


def test_no_group_of_the_inline_epilogue_is_incomplete():
    for name, each in CONFIGURATIONS.items():
        if each.sizes.get("EPILOGUE") == "inline":
            n_threads = 32 * each.sizes["num_warps"]
            assert each.sizes["BM"] * each.sizes["BN"] % (n_threads * PACK.value) == 0, name


def test_every_launch_says_whether_to_fuse_products_and_sums():
    assert all("enable_fp_fusion" in each.sizes for each in CONFIGURATIONS.values())


def test_the_kept_report_covers_every_configuration():
    kept = json.loads(RESULT.read_text())
    assert [row["name"] for row in kept["kernels"]] == list(CONFIGURATIONS)
    assert kept["target"] == "sm_90"


def test_every_candidate_is_compiled_and_some_have_their_misses_counted():
    options = candidates(torch.bfloat16, "ieee")
    assert all(f"filter bf16 {each.label}" in CONFIGURATIONS for each in options)
    kept = json.loads(RESULT.read_text())["kernels"]
    counted = [row["name"] for row in kept if "slots_per_miss" in row]
    for each in options:
        inline = each.epilogue == "inline" and not each.persistent
        assert (f"filter bf16 {each.label}" in counted) == inline


def test_a_spill_is_detected():
    row = {"local_bytes": 0, "instructions": {"LDL": 2}}
    assert compile_report.spills(row) and not compile_report.spills({**row, "instructions": {}})
