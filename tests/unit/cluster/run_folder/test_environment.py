"""Test what `env.json` keeps of the commands that started a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster.run_folder import environment, starts
from cluster.run_folder.files import ENVIRONMENT


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("store.path=s3://me:pass@host/bucket", "'store.path=s3://***@host/bucket'"),
        ("+model.hf_token=abc", "'+model.hf_token=***'"),
        ("submit.secrets=[abc]", "'submit.secrets=***'"),
        ("logging.api_key=x y", "'logging.api_key=***'"),
        ("data.path=hf_ABCDEFGHIJKLMNOP", "'data.path=***'"),
        ("data.bos_token=x", "data.bos_token=x"),
        ("train.tokens=1000", "train.tokens=1000"),
    ],
)
def test_commands_are_recorded_without_secrets(
    monkeypatch: pytest.MonkeyPatch, argument: str, shown: str
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "launch.py", argument])
    assert environment.command() == f"python launch.py {shown}"


def test_every_start_is_recorded_and_ranks_keep_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for stage in ("harvest", "train"):
        monkeypatch.setattr(sys, "orig_argv", ["python", "launch.py", f"stage={stage}"])
        starts.record_start(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", ["python", "default_worker.py"])
    starts.record_training(tmp_path)
    saved = json.loads((tmp_path / ENVIRONMENT).read_text())
    assert saved["command"] == "python launch.py stage=train"
    assert [one["command"].split("=")[1] for one in saved["starts"]] == ["harvest", "train"]
    assert saved["versions"] and saved["hardware"]["cores"]
    # A cell of a sweep is started by the sweep's command.
    (tmp_path / "cell").mkdir()
    starts.record_training(tmp_path / "cell")
    cell = json.loads((tmp_path / "cell" / ENVIRONMENT).read_text())
    assert cell["command"] == "python launch.py stage=train"
    (tmp_path / ENVIRONMENT).write_text("damaged")
    starts.record_start(tmp_path)
    assert len(json.loads((tmp_path / ENVIRONMENT).read_text())["starts"]) == 1
