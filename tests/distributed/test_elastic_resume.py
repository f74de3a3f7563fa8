"""Test checkpoints that move from mesh to mesh: same state, and same training afterwards."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

from foundation.atomic_files import read_json
from sae_core.checkpoint.folder import list_checkpoints, payload_files
from sae_core.checkpoint.reshard import reshard_checkpoint
from sae_core.checkpoint.row_ranges import read_layout, read_tensors
from tests.support.ranks import CHECKPOINT_FAILED, Ranks
from tests.support.trainer_ranks import N_LATENTS, Job, SyntheticSource, config_of, run_job

pytestmark = pytest.mark.distributed
AT = 25
HOPS = [
    # latent, data, ZeRO stage, update; 250 latents over 3 are 84, 84 and 82
    (2, 2, 0, "fused"),
    (1, 3, 1, "auto"),
    (3, 1, 0, "dense"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one rank with the fused update; return its checkpoints of steps 25 and 50."""
    folder = tmp_path_factory.mktemp("trained")
    run_job(Job(str(folder)))
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def moved(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Load and save the first checkpoint on one mesh after another; return all copies."""
    folder = tmp_path_factory.mktemp("moved")
    paths = [trained / f"step-{AT:08d}"]
    for number, (latent, data, zero, update) in enumerate(HOPS):
        job = Job(str(folder / str(number)), latent, data, zero, update, str(paths[-1]), steps=AT)
        run_job(job)
        paths += list_checkpoints(folder / str(number) / "checkpoints")
    return paths


def test_the_state_is_the_same_bit_for_bit_on_every_mesh(moved: list[Path]):
    first = moved[0]
    for hop, folder in zip(HOPS, moved[1:], strict=True):
        for part in ("weights", "optimizer"):
            a, b = read_tensors(first / part), read_tensors(folder / part)
            assert a.keys() == b.keys()
            differing = [name for name in a if not torch.equal(a[name], b[name])]
            assert not differing, (hop, differing)
        assert len(read_layout(folder / "weights")["sae.W_enc"].pieces) == hop[0] * hop[1]
        # The state has step, tokens (which set the learning rate) and the source's position.
        one, other = read_json(first / "state.json"), read_json(folder / "state.json")
        assert one | {"mesh": None} == other | {"mesh": None}
    moments = read_tensors(first / "optimizer")
    assert all(moment.any() for moment in moments.values())
    ages = read_tensors(first / "weights")["sae.tokens_since_fired"]
    assert len(ages.unique()) > 3 and len(ages) == N_LATENTS


@pytest.mark.slow
def test_training_continues_as_on_the_first_mesh(moved: list[Path], tmp_path: Path):
    stay = Job(str(tmp_path / "stay"), resume=str(moved[0]), steps=AT + 200, save_every=1000)
    rows = run_job(stay)
    resharded = reshard_checkpoint(moved[-1], tmp_path / "to", 5)
    go = replace(stay, folder=str(tmp_path / "go"), latent=2, data=2, resume=str(resharded))
    gone = run_job(go)
    assert [row["step"] for row in gone] == [row["step"] for row in rows] == [*range(26, 226)]
    assert abs(gone[0]["loss"] / rows[0]["loss"] - 1) < 1e-5
    ours, theirs = (mean(row["loss"] for row in part) for part in (rows, gone))
    assert abs(theirs / ours - 1) < 1e-3
    assert [row["lr"] for row in gone] == [row["lr"] for row in rows]


def test_ranks_share_the_check_and_agree_on_an_older_checkpoint(trained: Path, tmp_path: Path):
    """Rank 0 skips a checkpoint in which only rank 1 has found damage."""
    root = tmp_path / "checkpoints"
    root.mkdir()
    for folder in list_checkpoints(trained):
        reshard_checkpoint(folder, root, 2)
    newest = root / "step-00000050"
    path = next(newest / name for name in payload_files(newest)[1::2] if "weights" in name)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    rows = run_job(Job(str(tmp_path), 2, resume="newest", save_every=1000))
    assert rows[0]["step"] == AT + 1
    logs = [(tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert "skipping a damaged or unreadable checkpoint" in logs[0] and path.name in logs[0]
    assert "skipping" not in logs[1]


@pytest.mark.parametrize("lost", ["state.json", "weights/*", "optimizer/*"])
def test_a_checkpoint_that_one_rank_cannot_read_fails_all_ranks(
    trained: Path, tmp_path: Path, lost: str
):
    """Rank 1 sees the folder without some files, as can happen on a network file system."""
    whole, torn = trained / f"step-{AT:08d}", tmp_path / "torn"
    shutil.copytree(whole, torn)
    for path in torn.glob(lost):
        path.unlink()
    ranks = Ranks(tmp_path / "ranks", 2, _resume, str(tmp_path), [str(whole), str(torn)])
    assert ranks.codes() == [CHECKPOINT_FAILED] * 2, ranks.logs()
    assert all(f"CheckpointError: {torn}" in log for log in ranks.logs()), ranks.logs()


def _resume(folder: str, seen: list[str]) -> int:
    import torch.distributed as dist

    from sae_core.distributed.mesh import Mesh
    from sae_core.training.trainer import Trainer

    dist.init_process_group("gloo")
    mesh, job = Mesh.create("cpu", 2, 1), Job(folder, latent=2)
    trainer = Trainer(config_of(job), mesh, SyntheticSource(0, 1), Path(folder), 3, print, 1)
    trainer.resume(Path(seen[dist.get_rank()]))
    return 0
