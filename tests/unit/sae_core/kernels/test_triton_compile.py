"""Test that the Triton kernels compile for Hopper, do not spill and use the tensor cores."""

from __future__ import annotations

import json
import os

import pytest

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from benchmarks import compile_report

CONFIGURATIONS = {each.name: each for each in compile_report.configurations()}
RESULT = ROOT / compile_report.RESULT


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_compiles_without_spills_and_with_the_expected_instructions(name):
    row = compile_report.compile_one(CONFIGURATIONS[name])
    print(compile_report.format_row(row))
    assert not compile_report.spills(row), compile_report.format_row(row)
    products = {kind for kind in row["instructions"] if kind.endswith("GMMA")}
    assert products == set(CONFIGURATIONS[name].matrix.split())
    assert row["programs_per_sm"] * row["num_warps"] >= 8  # two warps per scheduler


def test_every_launch_says_whether_to_fuse_products_and_sums():
    assert all("enable_fp_fusion" in each.sizes for each in CONFIGURATIONS.values())


def test_the_kept_report_covers_every_configuration():
    kept = json.loads(RESULT.read_text())
    assert [row["name"] for row in kept["kernels"]] == list(CONFIGURATIONS)
    assert kept["target"] == "sm_90"


def test_a_spill_is_detected():
    row = {"local_bytes": 0, "instructions": {"LDL": 2}}
    assert compile_report.spills(row) and not compile_report.spills({**row, "instructions": {}})
