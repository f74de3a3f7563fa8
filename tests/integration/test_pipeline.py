"""Run the whole command on a tiny model: every artefact exists, and nothing is done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

from cluster.run_folder.metrics_log import logged_rows
from sae_core import load_sae
from tests.support.paths import ROOT
from tests.support.tiny_models import save_gpt2, write_text

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def launch(cwd: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "experiment=none",
        "name=tiny",
        f"cache_dir={cwd / 'cache'}",
        "model=hf",
        f"model.path={cwd / 'model'}",
        "model.hookpoints=[transformer.h.0,transformer.h.1]",
        "model.dtype=float32",
        "data=files",
        f"data.path={cwd / 'text.txt'}",
        "data.context_tokens=16",
        "data.tokens=3000",
        "data.heldout_fraction=0.2",
        "store.shard_tokens=512",
        "store.dtype=float32",
        "store.buffer_tokens=1024",
        "sae.hookpoint=transformer.h.1",
        "sae.n_latents=64",
        "sae.k=4",
        "optim.lr=1e-3",
        "train.batch_tokens=128",
        "train.tokens=6400",
        "eval.tokens=256",
        "logging.wandb=offline",
        *more,
    ]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=250, check=False
    )


def test_pipeline(tmp_path):
    save_gpt2(tmp_path / "model")
    write_text(tmp_path / "text.txt", documents=300)
    done = launch(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "tiny"

    store = zarr.open_group(run / "store", mode="r")
    assert store["transformer.h.0"].shape[1] == store["transformer.h.1"].shape[1] == 12
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    for key in ("fvu", "mse", "l0", "dead_fraction", "kl", "tokens"):
        assert metrics[key] is not None
    for key in ("clean", "recon", "zero", "mean", "recovered", "recovered_mean"):
        assert metrics[f"ce_{key}"] is not None
    assert metrics["hookpoint"] == "transformer.h.1" and metrics["l0"] <= 4
    rows = list(logged_rows(run))
    assert rows[-1]["step"] == 50 and rows[-1]["fvu"] < rows[0]["fvu"]
    assert load_sae(run).config.hookpoint == "transformer.h.1"
    assert (run / "export" / "saelens" / "cfg.json").exists()
    assert "transformer.h.1" in (run / "report" / "index.html").read_text()
    assert list((run / "wandb").glob("offline-run-*"))
    environment = json.loads((run / "env.json").read_text())
    assert environment["versions"]["torch"] and "commit" in environment

    again = launch(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "already done" in again.stdout
    assert len(list(logged_rows(run))) == len(rows)

    status = launch(tmp_path, "stage=status")
    assert "finalised" in status.stdout and "step-00000050" in status.stdout
    verified = launch(tmp_path, "stage=verify")
    assert "are intact" in verified.stdout, verified.stderr
    shard = run / "store" / "transformer.h.0" / "c.1.0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    damaged = launch(tmp_path, "stage=verify")
    assert damaged.returncode == 1
    assert "transformer.h.0/c.1.0" in damaged.stderr

    wider = launch(tmp_path, "stage=train", "sae.n_latents=128")
    assert wider.returncode == 2 and "sae.n_latents: 64 -> 128" in wider.stderr


def test_more_gpus_than_the_machine_has(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    from activation_store import StoreWriter

    writer = StoreWriter(tmp_path / "store", {"acts": 4}, shard_tokens=256)
    writer.write_item(0, torch.randn(256, 4).numpy())
    writer.finalise()
    done = launch(
        tmp_path,
        "stage=train",
        f"store.path={tmp_path / 'store'}",
        "train.device=cuda",
        "sae.hookpoint=null",
    )
    assert done.returncode == 2
    assert "expected one GPU per rank, but this machine has 0" in done.stderr
