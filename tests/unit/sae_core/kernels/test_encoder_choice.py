"""Test how the Triton encoder's candidate is chosen and kept, with made-up times."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from foundation.errors import ConfigError

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from triton import OutOfResources

from sae_core.kernels.interface import Prepared
from sae_core.kernels.triton import body
from sae_core.kernels.triton.body import TritonKernels
from sae_core.kernels.triton.encoder import choose
from sae_core.kernels.triton.encoder.candidates import candidates

SHAPE = (4096, 131072, 768, 32)
OPTIONS = candidates(torch.bfloat16, "ieee")
FASTEST = OPTIONS[3]


class Timer:
    """Stands in for `FilterTimer`."""

    made = 0
    fastest = FASTEST

    def __init__(self, encoder, *shape):
        Timer.made += 1
        self.shape = shape

    def __call__(self, candidate):
        return 1.0 if candidate == self.fastest else 2.0


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(body, "_check_triton", lambda: False)
    monkeypatch.setattr(choose, "FilterTimer", Timer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(choose.SWITCH, raising=False)
    Timer.made = 0


def chosen(*shape, **options):
    kernels = TritonKernels(torch.bfloat16, **options)
    kernels.prepare(*(shape or SHAPE))
    return kernels._encoder.tiles.few


def kept_file(tmp_path):
    (file,) = tmp_path.rglob("*.json")
    return file


def test_the_fastest_is_chosen_and_kept(tmp_path):
    assert isinstance(TritonKernels(), Prepared)
    assert TritonKernels()._encoder.tiles.few == OPTIONS[0]
    assert chosen() == FASTEST
    kept = json.loads(kept_file(tmp_path).read_text())
    assert kept["candidate"] == FASTEST.label and len(kept["times_ms"]) == len(OPTIONS)
    assert kept["case"]["gpu"] == "Some GPU" and kept["case"]["d_model"] == 768
    assert chosen() == FASTEST
    assert Timer.made == 1


def test_another_gpu_version_or_shape_is_timed_again(monkeypatch):
    chosen()
    chosen(4096, 131072, 1024, 32)
    chosen(4096, 131072, 768, 64)
    assert Timer.made == 3
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Another GPU")
    chosen()
    monkeypatch.setattr(torch, "__version__", "9.9")
    chosen()
    assert Timer.made == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: "{",
        lambda kept: json.dumps({**kept, "candidate": "of an earlier version"}),
        lambda kept: json.dumps({**kept, "candidate": 3}),
        lambda kept: json.dumps({**kept, "case": {**kept["case"], "gpu": "Another"}}),
        lambda kept: json.dumps([kept]),
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(tmp_path, damage):
    chosen()
    file = kept_file(tmp_path)
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.warns(UserWarning, match="ignoring the encoder's saved choice"):
        assert chosen() == FASTEST
    assert Timer.made == 2 and chosen() == FASTEST and Timer.made == 2


def test_a_cache_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.warns(UserWarning) as told:
        assert chosen() == FASTEST
    assert "could not save" in str(told[-1].message)


def test_the_cache_folder_is_that_of_the_user(tmp_path, monkeypatch):
    case = choose.Case("gpu", "1", "2", "bfloat16", "ieee", *SHAPE)
    folder = "latent-foundry/encoder"
    assert choose.choice_file(case, OPTIONS).parent == tmp_path / folder
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):  # the XDG specification ignores relative paths
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert choose.choice_file(case, OPTIONS).parent == tmp_path / "home/.cache" / folder


def test_the_switch_turns_timing_off(monkeypatch, tmp_path):
    chosen()
    monkeypatch.setenv(choose.SWITCH, "0")
    assert chosen() == OPTIONS[0] and Timer.made == 1
    monkeypatch.setenv(choose.SWITCH, "no")
    with pytest.raises(ConfigError, match="LATENT_FOUNDRY_TIME_ENCODER='no': expected 0 or 1"):
        chosen()


def test_nothing_is_timed_under_the_interpreter_or_without_such_segments(monkeypatch):
    assert chosen(4096, 2048, 768, 32) == OPTIONS[0]
    assert chosen(0, 131072, 768, 32) == OPTIONS[0]
    monkeypatch.setattr(body, "_check_triton", lambda: True)
    kernels = TritonKernels(torch.float16)
    kernels.prepare(*SHAPE)
    assert kernels._encoder.tiles.few.epilogue == "few" and Timer.made == 0


def test_the_prefilter_chooses_its_float8_encoder(monkeypatch):
    fastest = candidates(torch.float8_e4m3fn, "ieee")[1]
    monkeypatch.setattr(Timer, "fastest", fastest)
    kernels = TritonKernels(torch.bfloat16, float8_prefilter=True)
    kernels.prepare(*SHAPE)
    assert kernels._float8_encoder.tiles.few == fastest
    assert kernels._encoder.tiles.few == OPTIONS[0]


def test_candidates_that_triton_cannot_compile_are_left_out():
    def measure(candidate):
        if candidate.descriptors:
            raise OutOfResources(300000, 232448, "shared memory")
        return 1.0

    with pytest.warns(UserWarning, match="does not run on this GPU: out of resource") as told:
        times = choose.time_all(OPTIONS, measure)
    assert set(times) == {each.label for each in OPTIONS if not each.descriptors}
    assert len(told) == sum(each.descriptors for each in OPTIONS)


def test_an_error_of_the_device_is_not_taken_for_a_candidate_that_does_not_run(monkeypatch):
    class Broken(Timer):
        def __call__(self, candidate):
            if candidate.descriptors:
                raise RuntimeError("PassManager::run failed")
            return super().__call__(candidate)

    monkeypatch.setattr(choose, "FilterTimer", Broken)
    with pytest.warns(UserWarning, match="does not run on this GPU: PassManager"):
        assert not chosen().descriptors

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        chosen(4096, 131072, 512, 32)


def test_each_is_measured_twice_and_the_smaller_time_counts():
    measured = itertools.count(1.0)
    times = choose.time_all(OPTIONS[:2], lambda candidate: next(measured))
    assert list(times.values()) == [1.0, 2.0]
    measured = itertools.count(10.0, -1.0)
    times = choose.time_all(OPTIONS[:2], lambda candidate: next(measured))
    assert list(times.values()) == [7.0, 8.0]


def test_the_budget_of_time_ends_the_timing():
    clock = itertools.count(0.0, 15.0)
    with pytest.warns(UserWarning, match="no time is left"):
        times = choose.time_all(OPTIONS, lambda candidate: 1.0, lambda: next(clock))
    assert list(times) == [each.label for each in OPTIONS[:2]]


def test_too_little_memory_leaves_the_default(monkeypatch):
    def fail(*arguments):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(choose, "FilterTimer", fail)
    with pytest.warns(UserWarning, match="not timed: no memory"):
        assert chosen() == OPTIONS[0]


def test_labels_are_unique_and_sums_run_in_one_order():
    for dtype, precision in (
        (torch.bfloat16, "ieee"),
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.float8_e4m3fn, "ieee"),
    ):
        options = candidates(dtype, precision)
        assert len({each.label for each in options}) == len(options)
        assert len({each.tile.BK for each in options}) == 1
        default = options[0]
        assert not default.descriptors and not default.persistent
