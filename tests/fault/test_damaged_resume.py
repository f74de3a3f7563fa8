"""Test resuming from a damaged newest checkpoint: it is named, and the weights are the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.run_folder.metrics_log import logged_rows
from tests.support.single_rank import EVERY, STEPS, assert_same_end, make_run, make_store, train

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

NEWEST, BEFORE = f"step-{STEPS:08d}", f"step-{STEPS - EVERY:08d}"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an undisturbed run next to its store."""
    folder = tmp_path_factory.mktemp("damaged")
    make_store(folder / "store")
    run_dir = make_run(folder / "clean", folder / "store")
    train(run_dir)
    return run_dir


def weights_of(folder: Path) -> list[Path]:
    """List the files of the weights, the largest first."""
    files = (folder / "weights").glob("*.safetensors")
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


def flip(folder: Path) -> str:
    path = weights_of(folder)[0]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    return f"{path.name}: SHA-256 differs"


def truncate(folder: Path) -> str:
    path = weights_of(folder)[0]
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path.name}: {path.stat().st_size} bytes, the manifest says"


def delete(folder: Path) -> str:
    path = weights_of(folder)[0]
    path.unlink()
    return f"{path.name}: missing"


def swap(folder: Path) -> str:
    """Replace a file by the same file of an earlier step: undamaged, but outdated."""
    path = weights_of(folder)[0]
    shutil.copy(folder.with_name(BEFORE) / "weights" / path.name, path)
    return f"{path.name}: SHA-256 differs"


def no_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json"


@pytest.mark.parametrize("damage", [flip, truncate, delete, swap, no_manifest])
def test_a_run_resumes_from_the_checkpoint_before(
    clean: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(clean, run_dir)
    root = run_dir / "checkpoints"
    said = damage(root / NEWEST)
    (root / f"step-{STEPS + EVERY:08d}.tmp").mkdir()  # an unfinished save
    log = train(run_dir)
    assert "skipping a damaged or unreadable checkpoint" in log and NEWEST in log and said in log
    n_before = len(list(logged_rows(clean)))
    steps = [row["step"] for row in logged_rows(run_dir)][n_before:]
    assert steps == list(range(STEPS - EVERY + 5, STEPS + 1, 5)), (
        "did not resume from the checkpoint before"
    )
    assert_same_end(clean, run_dir)
