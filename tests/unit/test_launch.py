"""Test that invalid input ends in one line and exit code 2, before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sae.n_latent=5", "did you mean sae.n_latents"),
        ("colour=red", "Key 'colour' not in 'RunConfig'"),
        ("sae.k=many", "'many' of type 'str' could not be converted to Integer"),
        ("sae.k=5000", "between 1 and sae.n_latents=4096"),
        ("sae.architecture=transformer", "one of: topk"),
        ("stage=trian", "expected one of: pipeline"),
        ("model=nope", "Available options in 'model'"),
        ("name=../x", "not a path"),
        ("parallel.data=3", "a multiple of parallel.data=3"),
        ("parallel.latent=5000", "use fewer latent shards"),
        ("parallel.zero_stage=3", "0 or 1"),
        ("optim.update=fused parallel.zero_stage=1", "dense or auto"),
        ("store.dtype=float64", "bfloat16 or float32"),
        ("store.path=gs://bucket/x", "a folder, or an address s3://bucket/prefix"),
        ("data.path=/" + 300 * "x", "File name too long"),
        ("cache_dir=/dev/null/cache", "Not a directory"),
        ("store.shard_tokens=100", "the rows of one context"),
        ("store.mixture=[{path:b,weight:0}]", "store.mixture[0].weight=0.0"),
        ("store.mixture=[{weight:2}]", "an entry without a path"),
        ("store.path=b store.mixture=[{path:./b}]", "each store only once"),
        ("store.mixture=[{path:s3://me:secret@host/b}]", "without user name and password"),
        ("cluster.mode=concurrent store.mixture=[{path:b}]", "a mixture needs finalised stores"),
        ("checkpoint.keep=1", "at least 2"),
        ("checkpoint.every_minutes=0", "more than 0, or null"),
        ("optim.warmup_tokens=99999999", "at most train.tokens"),
        ("model.hookpoints=[]", "at least one module name"),
        ("sae.hookpoint=model.layers.3", "one of model.hookpoints"),
        ("data.heldout_fraction=0", "between 0 and 1"),
        ("train.kernels=fast", "one of: auto, stock, triton, reference"),
        (
            "train.kernels=triton train.device=cpu",
            "train.kernels='triton': expected kernels that run on train.device=cpu, such as stock",
        ),
        ("seed=-1", "0 or more"),
        ("seed=99999999999999999999", "an integer between -2**62 and 2**62"),
        ("+colour.shade=1", "colour={'shade': 1}: expected one of the settings: "),
        ("model=null", "Config group override must be a string or a list"),
        ("sae=5", "Config group override must be a string or a list"),
        ("optim.lr=nan", "a finite number"),
        ("data.tokens=100", "at least one batch"),
        ("stage=report name=nosuchrun", "no such run"),
        ("stage=verify name=nosuchrun", "no such run"),
        ("stage=fit", "fit.runs=None: expected a folder of runs"),
        ("stage=fit fit.runs=nosuch/*", "contains config.yaml"),
        ("fit.metric=mse", "fvu, loss, heldout_fvu"),
        ("reshard.shards=0", "at least 1"),
        ("stage=sweep sweep.n_latents=[16]", "sae.k=32: expected between 1 and"),
        ("stage=sweep sweep.overrides=['n1-k1:optim.lr=1']", "a cell's name, one of"),
        ("stage=sweep cluster.mode=concurrent", "sequential: the cells of a sweep"),
        ("stage=sweep sweep.k=[8,8]", "each value once"),
        ("stage=reshard name=nosuchrun", "no such run"),
        ("logging.wandb=maybe", "auto, online, offline or disabled"),
    ],
)
def test_bad_input(tmp_path, override, expected):
    done = launch(*override.split(), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_text_and_a_mixture_of_stores_go_together(tmp_path):
    mixture = ("store.mixture=[{path:b}]", "cluster.mode=sequential")
    planned = ("stage=plan", "plan.hardware=h100", "experiment=pythia_70m")
    done = launch(*planned, *mixture, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ", on 2 stores" in done.stdout


def test_train_without_a_store(tmp_path):
    done = launch("stage=train", "store.path=missing", cwd=tmp_path)
    assert done.returncode == 2
    assert "missing': expected a store of activations" in done.stderr


def test_help_names_stages_groups_and_examples(tmp_path):
    done = launch("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in (
        "pipeline",
        "evaluate",
        "experiment: ",
        "llama_8b_131k",
        "stage=train name=own",
    ):
        assert word in done.stdout


def test_a_changed_config_is_refused_with_a_diff(tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)  # a failed start keeps an existing folder
    launch("stage=train", "store.path=missing", cwd=tmp_path)
    corrected = launch("stage=train", "store.path=missing", "sae.k=31", cwd=tmp_path)
    assert "sae.k" not in corrected.stderr  # an empty run may change its config
    launch("stage=train", "store.path=missing", cwd=tmp_path)
    (tmp_path / "runs" / "demo" / "metrics.jsonl").touch()
    again = launch("stage=train", "store.path=missing", "sae.k=16", "eval.tokens=9", cwd=tmp_path)
    assert again.returncode == 2
    assert "sae.k: 32 -> 16" in again.stderr and "eval.tokens" not in again.stderr


@pytest.mark.parametrize("stage", ["train", "sweep"])
def test_a_missing_store_is_named_before_torch_is_imported(tmp_path: Path, stage: str):
    code = f"""
import sys
sys.argv = ["launch.py", "experiment=none", "stage={stage}", "name=x", "store.path=nosuch"]
sys.path.insert(0, {str(ROOT)!r})
import launch
try:
    launch.main()
finally:
    heavy = {{"torch", "ray", "transformers", "deepspeed"}} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "nosuch': expected a store of activations; create one with" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_reference_names_every_key(tmp_path: Path):
    done = launch("--keys", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "  optim.lr=null  (float | None)\n      Peak learning rate; null: lr_at_16k" in done.stdout
    )
    assert "  name=demo  (str)" in done.stdout
    one = launch("--keys", "eval", cwd=tmp_path)
    assert one.stdout.startswith("eval: ") and "optim." not in one.stdout
    unknown = launch("--keys", "evil", cwd=tmp_path)
    assert unknown.returncode == 2 and "expected one of: model, data" in unknown.stderr
