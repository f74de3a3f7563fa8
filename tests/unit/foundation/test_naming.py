"""Test that errors of writing, such as those of a full disk, name the file."""

from __future__ import annotations

import errno
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import StoreWriter
from cluster.run_folder.metrics_log import MetricsWriter
from conf.failure import describe_error
from foundation.atomic_files import naming, write_json
from foundation.errors import EXIT_FAILED
from sae_core.checkpoint.safetensors_file import TensorFileWriter
from tests.support.paths import ROOT


def write_store(folder: Path) -> None:
    writer = StoreWriter(folder / "store", {"a": 64}, shard_tokens=1024)
    writer.write_item(0, np.ones((1024, 64), np.float32))


def write_tensors(folder: Path) -> None:
    shapes = {"a": (torch.float32, (1024, 64))}
    with TensorFileWriter(folder / "a.safetensors", shapes) as file:
        file.write_rows("a", 0, torch.ones(1024, 64))


def write_metrics(folder: Path) -> None:
    log = MetricsWriter(folder)
    for step in range(10_000):
        log.write({"step": step})


WRITERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "json": (lambda folder: write_json(folder / "a.json", list(range(100_000))), "a.json"),
    "store": (write_store, "store/_tmp/"),
    "tensors": (write_tensors, "a.safetensors"),
    "metrics": (write_metrics, "metrics.jsonl"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_is_told_in_one_line_with_the_file(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, name, str(tmp_path)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == EXIT_FAILED, done.stderr
    line = f"error: {tmp_path / WRITERS[name][1]}"
    assert done.stdout.startswith(line) and "File too large" in done.stdout
    assert done.stdout.count("\n") == 1


def test_names_survive_processes_and_are_not_replaced() -> None:
    with pytest.raises(OSError) as raised, naming(Path("outer")), naming(Path("inner")):
        raise OSError(errno.ENOSPC, "No space left on device")
    received = pickle.loads(pickle.dumps(raised.value))
    assert received.filename == "inner"
    text = "error: inner: No space left on device; free space and run the same command again"
    assert describe_error(received) == (text, EXIT_FAILED)
    unnamed, code = describe_error(OSError(errno.ENOSPC, "No space left on device"))
    assert unnamed is not None and "a file in runs_dir" in unnamed and code == EXIT_FAILED
    assert describe_error(OSError("of another kind")) == (None, EXIT_FAILED)


if __name__ == "__main__":
    # Files are limited to 32 KiB, which fails like a full disk. Python ignores the limit's signal.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))
    try:
        WRITERS[sys.argv[1]][0](Path(sys.argv[2]))
    except OSError as error:
        message, code = describe_error(error)
        print(message)
        sys.exit(code)
