"""Test that all ranks take the same prefilter, and that a resumed run keeps it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster.run_folder.files import CONFIG, PREFILTER
from cluster.run_folder.saved_config import load_config, save_config
from sae_core.kernels.prefilter_choice import PrefilterChoice
from tests.support.ranks import Ranks
from tests.support.single_rank import BATCH, make_run, make_store
from tests.support.single_rank import train as single_rank
from tests.support.toys.architecture import registered_toys
from tests.support.toys.prefilter import registered_delayed
from tests.support.trainer_ranks import Job, SyntheticSource, config_of

pytestmark = pytest.mark.distributed

Delays = tuple[float, float]
"""Extra seconds of the full product and of the prefilter; see `tests.support.toys.prefilter`."""
STEPS = 18
FAST_FILTER, SLOW_FILTER, NO_FILTER = (0.15, 0.0), (0.0, 0.15), (0.05, -1.0)


def train(folder: Path, delays: list[Delays], resume: Path | None = None, **job: Any) -> list[Any]:
    """Train a few steps with one rank for each pair of delays; return each rank's choice."""
    folder.mkdir(exist_ok=True)
    whole = Job(
        str(folder),
        latent=len(delays),
        resume=str(resume) if resume else None,
        overrides={"n_latents": 24_000 * len(delays)},
        **{"kernels": "delayed", "steps": 2 * STEPS if resume else STEPS, **job},
    )
    ranks = Ranks(folder / "ranks", len(delays), _rank, whole, delays)
    assert not any(ranks.codes()), ranks.logs()
    return [json.loads((folder / f"choice-{rank}.json").read_text()) for rank in range(len(delays))]


def _rank(job: Job, delays: list[Delays]) -> int:
    import torch
    import torch.distributed as dist

    from sae_core.distributed.mesh import Mesh
    from sae_core.training.lockstep import train_to_end
    from sae_core.training.trainer import Trainer

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    with registered_toys(), registered_delayed(*delays[rank]):
        dist.init_process_group("gloo")
        mesh = Mesh.create("cpu", job.latent, 1)
        checkpoints = Path(job.folder) / "checkpoints"
        trainer = Trainer(
            config_of(job), mesh, SyntheticSource(0, 1), checkpoints, 3, lambda row: None, 1
        )
        if job.resume:
            trainer.resume(Path(job.resume))
        else:
            trainer.calibrate()
        train_to_end(trainer)
        kernels: Any = trainer.engine.sae.kernels
        used = kernels.prefilter
        choice = asdict(trainer.prefilter) if trainer.prefilter else {}
        answer = {"choice": choice, "used": used.name if used else "none"}
        (Path(job.folder) / f"choice-{rank}.json").write_text(json.dumps(answer))
        dist.barrier()
        dist.destroy_process_group()
    return 0


def checkpoint(folder: Path) -> Path:
    (found,) = (folder / "checkpoints").glob("step-*")
    return found


@pytest.mark.parametrize(
    ("delays", "chosen", "timed"),
    [
        ([FAST_FILTER, FAST_FILTER], "delayed", {"none", "delayed"}),
        ([FAST_FILTER, (0.0, 0.4)], "none", {"none", "delayed"}),  # the slowest rank counts
        ([FAST_FILTER, NO_FILTER], "none", {"none"}),
    ],
)
def test_all_ranks_take_the_same(tmp_path, delays, chosen, timed):
    answers = train(tmp_path, delays)
    assert answers[0] == answers[1]
    choice = answers[0]["choice"]
    assert answers[0]["used"] == choice["name"] == chosen
    assert set(choice["seconds"]) == timed
    state = json.loads((checkpoint(tmp_path) / "state.json").read_text())
    assert state["prefilter"] == choice


def test_a_resumed_run_keeps_the_choice(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    (before,) = train(first, [FAST_FILTER])
    assert before["used"] == "delayed"
    # Now the other one would be faster, but nothing is timed.
    (after,) = train(second, [SLOW_FILTER], resume=checkpoint(first))
    assert after == before
    log = (second / "ranks" / "rank-0.log").read_text()
    assert "choosing" not in log


@pytest.mark.parametrize(
    "change", [{"processor": "another one"}, {"name": "float8"}], ids=["processor", "name"]
)
def test_a_choice_that_cannot_be_kept_is_made_again(tmp_path, change):
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, [FAST_FILTER])
    path = checkpoint(first) / "state.json"
    state = json.loads(path.read_text())
    state["prefilter"] |= change
    path.write_text(json.dumps(state))
    (after,) = train(second, [SLOW_FILTER], resume=checkpoint(first))
    assert after["used"] == after["choice"]["name"] == "none"
    log = (second / "ranks" / "rank-0.log").read_text()
    assert "again" in log and "nearly tied latents" in log


def test_a_choice_that_the_kernels_lack_is_dropped_with_a_warning(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    (before,) = train(first, [FAST_FILTER])
    assert before["used"] == "delayed"
    (after,) = train(second, [FAST_FILTER], resume=checkpoint(first), kernels="copying")
    assert after == {"choice": {}, "used": "none"}
    assert "using none" in (second / "ranks" / "rank-0.log").read_text()


def test_a_choice_of_the_user_is_not_timed(tmp_path):
    (answer,) = train(tmp_path, [FAST_FILTER], kernels="stock", prefilter="none")
    assert answer == {"choice": {}, "used": "none"}


def test_a_run_records_its_choice(tmp_path):
    make_store(tmp_path / "store")
    run = make_run(tmp_path / "run", tmp_path / "store")
    config = load_config(run / CONFIG)
    config.sae.n_latents, config.train.tokens = 20_000, BATCH  # 64 x 20,000 x 16 products
    save_config(config, run / CONFIG)
    log = single_rank(run)
    recorded = json.loads((run / PREFILTER).read_text())
    assert recorded["name"] in ("none", "bfloat16x3") and recorded["seconds"]["none"] > 0
    assert recorded == json.loads((checkpoint(run) / "state.json").read_text())["prefilter"]
    assert f"run: {PrefilterChoice(**recorded)}" in log
