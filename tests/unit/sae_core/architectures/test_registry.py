"""Test that a registered architecture reaches config, sweeps, plans and pages without an edit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from analysis.pages.run_page import render
from analysis.scaling_laws.cells import read_sweep
from cluster.planning.hardware import gpu
from cluster.planning.mesh_search import layouts, plan_layout
from cluster.planning.stage import run as plan
from cluster.run_folder.saved_config import load_config, save_config
from conf.config_store import store_schemas
from conf.failure import describe_error
from conf.schema.plan import PlanConfig
from conf.schema.run import RunConfig
from conf.schema.sweep import SweepConfig
from conf.sweep_cells import cells_of
from foundation.errors import ConfigError
from sae_core.architectures.registry import (
    ARCHITECTURES,
    architecture_of,
    settings_from_json,
    with_architecture,
)
from sae_core.config import OptimConfig, ParallelConfig, SAEConfig, TopKConfig, TrainConfig
from sae_core.kernels.registry import KERNELS
from tests.support.paths import ROOT
from tests.support.toys.architecture import TOY, ToyConfig, registered_toys


@pytest.fixture(autouse=True)
def _toys() -> Iterator[None]:
    with registered_toys():
        yield


def config(**parts: object) -> RunConfig:
    parts.setdefault("sae", ToyConfig(n_latents=512, penalty=0.5))
    result = RunConfig(name="t", stage="plan", **parts)  # type: ignore[arg-type]
    result.model.d_model = 64
    return result


def test_settings_and_their_class_are_validated() -> None:
    assert {"topk", "toy"} <= set(ARCHITECTURES.names())
    config().trainer.validate()
    for sae, said in (
        (ToyConfig(penalty=-1), r"sae.penalty=-1"),
        (ToyConfig(n_latents=0), r"sae.n_latents=0"),
        (SAEConfig(), r"sae.architecture='': expected one of: topk, .*toy"),
        (TopKConfig(architecture="toy"), "the architecture of these settings, TopKConfig.*sae=toy"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(sae=sae).trainer.validate()


def test_an_update_that_the_architecture_lacks_is_refused() -> None:
    assert not config().trainer.fused and RunConfig().trainer.fused
    for optim in (OptimConfig(update="fused"), OptimConfig(moments="bfloat16")):
        replace(config(optim=optim), sae=TopKConfig()).trainer.validate()
        with pytest.raises(ConfigError, match=r"optim\.(update|moments)=.*expected.*dense"):
            config(optim=optim).trainer.validate()


def test_stored_settings_keep_their_class() -> None:
    for sae in (ToyConfig(penalty=0.5), TopKConfig(k=5)):
        again = settings_from_json(json.loads(json.dumps(asdict(sae))))
        assert type(again) is type(sae) and again == sae
    assert settings_from_json({"k": 4}) == TopKConfig(k=4), "written before there was a name"
    with pytest.raises(ValueError, match=r"unknown field of ToyConfig: k"):
        settings_from_json({"architecture": "toy", "k": 4})
    with pytest.raises(ConfigError, match=r"sae.architecture='gone'"):
        settings_from_json({"architecture": "gone"})
    with pytest.raises(ValueError, match="expected a name"):
        settings_from_json({"architecture": 5})


def test_a_run_config_is_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    saved = config()
    saved.name, saved.runs_dir = tmp_path.name, str(tmp_path.parent)
    save_config(saved, path)
    assert load_config(path) == saved and type(load_config(path).sae) is ToyConfig
    text = path.read_text()
    path.write_text(text.replace("architecture: toy", "architecture: gone"))
    with pytest.raises(ConfigError, match=r"sae.architecture='gone': expected one of: topk, .*toy"):
        load_config(path)
    path.write_text(text.replace("penalty: 0.5", "k: 4"))
    with pytest.raises(ConfigError, match="'k' not in 'ToyConfig'"):
        load_config(path)
    save_config(RunConfig(sae=TopKConfig(k=5)), path)
    path.write_text(path.read_text().replace("  architecture: topk\n", ""))
    assert load_config(path).sae == TopKConfig(k=5)


def composed(*overrides: str) -> RunConfig:
    store_schemas()
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return OmegaConf.to_object(compose("config", overrides=list(overrides)))  # type: ignore[return-value]
    finally:
        for name in ("toy.yaml", "toy_schema.yaml"):
            ConfigStore.instance().repo["sae"].pop(name)


def test_hydra_composes_it_by_its_name() -> None:
    sae = composed("sae=toy", "experiment=none", "sae.penalty=3", "sae.n_latents=77").sae
    assert sae == ToyConfig(n_latents=77, penalty=3.0) and type(sae) is ToyConfig
    assert type(composed("sae.k=7").sae) is TopKConfig
    for override, said in (
        ("sae.penalties=3", "Key 'penalties' not in 'ToyConfig'.*did you mean sae.penalty"),
        ("sae.k=3", "Key 'k' not in 'ToyConfig'"),
        ("sae.penalty=many", "could not be converted to Float"),
    ):
        with pytest.raises(Exception) as raised:
            composed("sae=toy", "experiment=none", override)
        message, code = describe_error(raised.value)
        assert message is not None and code == 2
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(message)


def test_a_sweep_takes_it_as_an_axis() -> None:
    def cells(**sweep: object) -> dict[str, RunConfig]:
        return cells_of(config(sweep=SweepConfig(**sweep)), Path("r"))  # type: ignore[arg-type]

    grid = cells(architecture=["toy", "topk"], overrides=["n512-toy:sae.penalty=2"])
    assert list(grid) == ["n512-toy", "n512-k32-topk"]
    assert grid["n512-toy"].sae == ToyConfig(n_latents=512, penalty=2.0)
    assert grid["n512-k32-topk"].sae == TopKConfig(n_latents=512)
    assert list(cells(n_latents=[256])) == ["n256"]
    with pytest.raises(ConfigError, match=r"sweep.k=8: .*architecture toy has no setting sae.k"):
        cells(k=[8])
    with pytest.raises(ConfigError, match=r"sae.architecture='gone'"):
        cells(architecture=["gone"])
    assert with_architecture(TopKConfig(dead_after_tokens=7), "toy") == ToyConfig(
        dead_after_tokens=7
    )


def test_it_is_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hardware = gpu(PlanConfig(hardware="h100"))
    layout = plan_layout(config(), 64, hardware, ParallelConfig(2, 2))
    work = layout.work
    assert (work.k, work.auxk, work.fused, layout.exchange) == (512, 0, False, "dense")
    assert layout.device["gradients"] > 0 and layout.step_s > 0
    assert {one.exchange for one in layouts(config(), 64, hardware, 2)} == {
        "none",
        "dense",
        "dense, ZeRO 1",
    }
    planned = config(plan=PlanConfig(hardware="h100"))
    planned.data.tokens = planned.train.tokens
    plan(planned, tmp_path)
    assert "512 latents, all of them counted as active" in capsys.readouterr().out


def test_pages_and_laws_do_not_assume_k(tmp_path: Path) -> None:
    page = render(config(), tmp_path)
    assert "toy SAE, 512 latents, on" in page and "k = " not in page
    assert "topk SAE, 4,096 latents, k = 32" in render(RunConfig(), tmp_path)
    (tmp_path / "run").mkdir()
    save_config(config(train=TrainConfig(tokens=2048)), tmp_path / "run" / "config.yaml")
    row = {"step": 1, "tokens": 2048, "sae": "s", "fvu": 0.5, "loss": 0.5}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    sweep = read_sweep(str(tmp_path), "fvu")
    assert "fixed number of active latents" in sweep.left_out["run"]


def test_kernel_bodies_are_registered_too() -> None:
    TrainConfig(kernels="copying").validate()
    assert KERNELS.names() == ["stock", "triton", "reference", "copying", "slotted"]
    with pytest.raises(ConfigError, match="one of: auto, stock, triton, reference, copying, slot"):
        TrainConfig(kernels="fast").validate()
    with pytest.raises(ConfigError, match=r"train.prefilter='float8': expected one of auto, none"):
        TrainConfig(kernels="copying", prefilter="float8").validate()
    assert architecture_of(ToyConfig()) is TOY
