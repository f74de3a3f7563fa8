"""Test a sweep's cells (names, configs, groups) and the stream that they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from activation_store import open_store
from cluster.planning.hardware import gpu
from cluster.planning.mesh_search import plan_layout
from cluster.run_folder.saved_config import forbidden_changes
from cluster.run_folder.sweep_record import STOPPED, clear_failure, read_record, write_record
from cluster.sweep.groups import cells_that_fit, training_groups
from cluster.training.batch_order import BatchOrder
from cluster.training.store_source import StoreSource
from conf.schema.plan import PlanConfig
from conf.schema.run import RunConfig
from conf.schema.sweep import SweepConfig
from conf.sweep_cells import cells_of
from foundation.errors import ConfigError
from sae_core.config import ParallelConfig, TopKConfig
from sae_core.engine.lr_schedule import peak_lr
from sae_core.errors import CheckpointError, DivergedError
from sae_core.training.shared_source import SharedSource
from sae_core.training.source import Batch
from tests.support.single_rank import make_store


def config(**sweep: object) -> RunConfig:
    return RunConfig(name="s", stage="sweep", seed=5, sweep=SweepConfig(**sweep))  # type: ignore[arg-type]


def test_a_grid_of_ordinary_runs() -> None:
    base = config(n_latents=[512, 256], k=[8, 16], lr=[None, 0.01], seed=[1, 2])
    cells = cells_of(base, Path("/r/s"))
    assert len(cells) == 16 and next(iter(cells)) == "n256-k8-lrauto-seed1"
    cell = cells["n512-k16-lr0.01-seed2"]
    assert isinstance(cell.sae, TopKConfig)
    assert (cell.sae.n_latents, cell.sae.k, cell.optim.lr, cell.seed) == (512, 16, 0.01, 2)
    assert (cell.name, cell.runs_dir, cell.stage) == ("n512-k16-lr0.01-seed2", "/r/s", "train")
    assert {one.order_seed for one in cells.values()} == {5}, "seeds must not move the stream"
    assert list(cells_of(config(), Path("r"))) == ["n4096-k32"]


def test_an_axis_that_grows_keeps_its_cells() -> None:
    before = cells_of(config(n_latents=[256], k=[8]), Path("r"))
    after = cells_of(config(n_latents=[256, 512], k=[8, 16]), Path("r"))
    assert forbidden_changes(before["n256-k8"], after["n256-k8"]) == {}


def test_the_learning_rate_rule_and_a_cell_that_overrides_it() -> None:
    base = config(n_latents=[256, 1024], overrides=["n1024-k32:optim.lr=0.5"])
    cells = cells_of(base, Path("r"))
    rates = {name: peak_lr(cell.optim, cell.sae.n_latents) for name, cell in cells.items()}
    assert rates == {"n256-k32": pytest.approx(2e-4 * 8), "n1024-k32": 0.5}


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"overrides": ["n1-k1:optim.lr=1"]}, "a cell's name, one of"),
        ({"overrides": ["n4096-k32:train.batch_tokens=64"]}, "setting of sae other than hookpoint"),
        ({"overrides": ["n4096-k32:sae.hookpoint=x"]}, "setting of sae other than hookpoint"),
        ({"overrides": ["n4096-k32:optim.colour=red"]}, "known keys"),
        ({"overrides": ["n4096-k32"]}, "CELL:KEY=VALUE"),
        ({"n_latents": [16], "k": [32]}, "sae.k=32"),
        ({"architecture": ["transformer"]}, "sae.architecture"),
        ({"lr": [1.0000001e-3, 1e-3]}, "sweep.lr=.*first 6 significant digits"),
        (
            {"overrides": ["n4096-k32:sae.k=16"]},
            "a setting of sae other than hookpoint, n_latents, k and architecture",
        ),
    ],
)
def test_invalid_cells_are_refused(sweep: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cells_of(config(**sweep), Path("r"))


@pytest.mark.parametrize(
    "sweep", [{"k": [8, 8]}, {"seed": [-1]}, {"saes_per_process": 0}, {"diverged_fvu": 0.0}]
)
def test_invalid_settings_are_refused(sweep: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"sweep.{next(iter(sweep))}"):
        config(**sweep).sweep.validate()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_groups_have_as_many_cells_as_fit_in_memory(device: str) -> None:
    cells = cells_of(config(n_latents=[1 << 14, 1 << 15], k=[8, 16]), Path("r"))
    hardware = gpu(PlanConfig(hardware="h100", memory_gib=1.0))
    hardware = replace(hardware, device=device, process_bytes=1e9)
    roomy = replace(hardware, memory_bytes=0.0)
    layout = plan_layout(cells["n32768-k16"], 2048, roomy, ParallelConfig())
    one = layout.device_total + (sum(layout.host.values()) if device == "cpu" else 0)

    def fit(room: float) -> int:
        return cells_that_fit(cells, 2048, replace(hardware, memory_bytes=room / 0.8))

    own = one - 1e9 - layout.device["loader"]
    assert [fit(one + n * own + 1e6) for n in (0, 1, 29)] == [1, 2, 30]
    with pytest.raises(ConfigError, match=r"sweep.n_latents=32768: expected cells that fit"):
        fit(one - 1e6)
    assert training_groups(cells, 3) == [list(cells)[:3], list(cells)[3:]]


def test_a_sweep_retries_failed_cells_but_not_diverged_ones(tmp_path: Path) -> None:
    write_record(tmp_path, CheckpointError("a full disk"))
    clear_failure(tmp_path)
    assert read_record(tmp_path) is None
    write_record(tmp_path, DivergedError("FVU 7"))
    clear_failure(tmp_path)
    assert read_record(tmp_path) == (STOPPED, "FVU 7")


class Counting:
    """A source whose batch i is filled with i, and which counts its reads."""

    d_in = d_out = 2
    identity = "counting"

    def __init__(self) -> None:
        self.position = 0
        self.reads = 0

    def sample(self, n: int) -> torch.Tensor:
        self.reads += 1
        return torch.zeros(n, 2)

    def seek(self, position: int) -> None:
        self.position = position

    def next(self) -> Batch:
        self.reads += 1
        self.position += 1
        return Batch(torch.full((4, 2), float(self.position - 1)), None, 0)


def test_views_share_a_read_and_keep_their_positions() -> None:
    source = Counting()
    shared_source = SharedSource(source, torch.device("cpu"))
    behind, ahead = shared_source.view(), shared_source.view()
    assert shared_source.view().sample(3) is shared_source.view().sample(3) and source.reads == 1
    ahead.seek(2)
    seen = [float(behind.next().x[0, 0]) for _ in range(2)]
    assert seen == [0, 1] and ahead.position == 2 == behind.position
    assert behind.next().x is ahead.next().x and source.reads == 4
    behind.seek(1)
    assert float(behind.next().x[0, 0]) == 1


def test_the_order_may_have_its_own_seed(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    store = open_store(tmp_path / "s")
    sources = [
        StoreSource(store, "acts", BatchOrder(seed, 64, 2, 512, order))
        for seed, order in ((0, None), (1, None), (1, 0), (2, 0), (0, 3))
    ]
    first = [source.next().x for source in sources]
    for source in sources:
        source.close()
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2]) and torch.equal(first[2], first[3])
    assert not torch.equal(first[0], first[4])
    assert sources[0].identity == sources[1].identity
    assert sources[2].identity == sources[3].identity != sources[4].identity
