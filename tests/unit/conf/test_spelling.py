"""Test the spellings that are suggested for settings that Hydra refuses."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from conf.spelling import require_no_dashes, suggestion
from foundation.errors import EXIT_BAD_INPUT, ConfigError
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("argument", "written"),
    [
        ("train.tokens=2e6", "train.tokens=2000000"),
        ("train.tokens=1,000", "train.tokens=1000"),
        ("train.tokens =5000", "train.tokens=5000"),
        ("sae.k=3.0", "sae.k=3"),
        ("sae.dead_after_tokens=1e6", "sae.dead_after_tokens=1000000"),
        ("model.hookpoints=transformer.h.1", "model.hookpoints=[transformer.h.1]"),
        ("model.hookpoints=a.1, a.2", "model.hookpoints=[a.1,a.2]"),
        ("sweep.k=16,32", "sweep.k=[16,32]"),
        ("name=grün", 'name="grün"'),
        ("data.path=/tmp/(x)/a=b.txt", 'data.path="/tmp/(x)/a=b.txt"'),
        ("data.path=a,b.txt", 'data.path="a,b.txt"'),
        ("data.path='a", 'data.path="a"'),
        ("train.tokens", "train.tokens=VALUE"),
        # Correct, or wrong in a way for which no spelling is right.
        ("train.tokens=5", None),
        ("train.tokens=null", None),
        ("data.path=/a b/c.txt", None),
        ("sae.k=3.5", None),
        ("sae.k=x", None),
        ("optim.lr=2e-3", None),
        ("optim.lr=fast", None),
        ("nothing.of=that", None),
        ("logging.wandb=on", None),
    ],
)
def test_suggestions(argument: str, written: str | None) -> None:
    found = suggestion(["stage=train", argument])
    assert found == (None if written is None else shlex.quote(written))


def test_settings_are_not_options() -> None:
    for arguments in (["--name", "x"], ["--name=x"], ["-name", "x"]):
        with pytest.raises(ConfigError, match=r"without dashes; write name=x"):
            require_no_dashes(arguments)
    require_no_dashes(["--cfg", "job", "-m", "--multirun", "--config-dir=x", "name=x"])


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("train.tokens=2e6", "could not be converted to Integer; full_key: train.tokens; write "
         "train.tokens=2000000\n"),
        ("model.hookpoints=a,b", "Ambiguous value for argument 'model.hookpoints=a,b'; write "
         "'model.hookpoints=[a,b]'\n"),
        ("name=grün", "could not read name=grün; write 'name=\"grün\"'\n"),
        ("--name=x", "without dashes; write name=x\n"),
    ],
)  # fmt: skip
def test_the_command_line_answers_with_the_spelling(argument: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "stage=status", argument],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stderr.startswith("error: ") and done.stderr.endswith(said), done.stderr
    assert done.stderr.count("\n") == 1
