"""Test data sets on the Hub, read by the `datasets` library from a server on this machine.

The addresses of the Hub are read when `huggingface_hub` is imported. The tests therefore read in
another process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cluster.language_model.errors import TextError
from cluster.language_model.texts import find_text
from conf.schema.data import DataConfig
from tests.support.hub_server import COMMIT, hub_server
from tests.support.paths import ROOT

CONFIGS = """---
configs:
- config_name: en
  data_files: en.jsonl
- config_name: de
  data_files: de.jsonl
---
"""
SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
from cluster.language_model.errors import TextError
from cluster.language_model.texts import Tally, find_text, pin_revisions
from conf.schema.data import DataConfig, MixedText

answers = []
for settings in json.loads(sys.argv[1]):
    only = settings.pop("only", None)
    mixture = [MixedText(**one) for one in settings.pop("mixture", [])]
    data = DataConfig(**settings, mixture=mixture)
    try:
        if only == "pin":
            answers.append(pin_revisions(data).revision)
            continue
        text = find_text(data)
        text.check()
        tally = Tally()
        documents = list(text.documents(tally))
        answers.append([documents, tally.null, tally.blank, text.sha256(Path(sys.argv[2]))])
    except TextError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""
needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the package datasets"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    root = tmp_path_factory.mktemp("hub")
    one, two = root / "org" / "one", root / "org" / "two"
    (one / "data").mkdir(parents=True)
    splits: dict[str, list[str | None]] = {"train": ["a", None, " ", "c"], "test": ["t"]}
    for split, texts in splits.items():
        table = pyarrow.table({"text": texts, "id": range(len(texts))})
        table = table.append_column("meta", pyarrow.array([{"body": text} for text in texts]))
        pyarrow.parquet.write_table(table, one / "data" / f"{split}-00000-of-00001.parquet")
    (one / "README.md").write_text("# a card\n")
    two.mkdir()
    (two / "README.md").write_text(CONFIGS)
    (two / "en.jsonl").write_text('{"text": "english"}\n')
    (two / "de.jsonl").write_text('{"text": "deutsch"}\n')
    with hub_server(root) as address:
        yield address, tmp_path_factory.mktemp("home")


def answers(hub: tuple[str, Path], *settings: dict[str, Any], **variables: str) -> list[Any]:
    address, home = hub
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    environment.pop("HF_HUB_OFFLINE" if "HF_HUB_OFFLINE" not in variables else "", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(settings), str(home)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


@needs_datasets
def test_splits_subsets_fields_and_streams(hub: tuple[str, Path]) -> None:
    one, two = {"path": "org/one"}, {"path": "org/two"}
    got = answers(
        hub,
        one,
        {**one, "streaming": True, "max_documents": 9},
        {**one, "split": "test"},
        {**one, "split": "train[:1]"},
        {**one, "split": "all"},
        {**one, "text_field": "meta.body"},
        {**two, "subset": "de"},
        {**one, "mixture": [{"path": "org/two", "subset": "en", "weight": 7.0}]},
    )
    train = [["a", "c"], 1, 1]
    assert [answer[:3] for answer in got[:2]] == [train, train]
    assert [answer[0] for answer in got[2:5]] == [["t"], ["a"], ["a", "c", "t"]]
    assert got[5][:3] == train
    assert got[6][0] == ["deutsch"]
    assert got[7][0] == ["a", "english", "c"]
    assert len({answer[3] for answer in got}) == len(got)
    again = answers(hub, {**one, "revision": COMMIT}, HF_HUB_OFFLINE="1")
    assert again == [got[0]]  # what was downloaded is read without the Hub


@needs_datasets
def test_mistakes_are_told(hub: tuple[str, Path]) -> None:
    got = answers(
        hub,
        {"path": "org/none"},
        {"path": "org/one", "split": "dev"},
        {"path": "org/one", "text_field": "body"},
        {"path": "org/one", "revision": "v9"},
        {"path": "org/two"},
        {"path": "org/two", "subset": "fr"},
    )
    for answer, words in zip(
        got,
        (
            ["'org/none' is neither a file", "RepositoryNotFound"],
            ["data.split='dev'", "['train', 'test']"],
            ["row 1", "['id', 'meta.body', 'text']"],
            ["RevisionNotFound"],
            ["['en', 'de']"],
            ["data.subset='fr'", "['en', 'de']"],
        ),
        strict=True,
    ):
        assert isinstance(answer, str) and all(word in answer for word in words), answer


def test_a_branch_is_pinned_to_its_commit(hub: tuple[str, Path]) -> None:
    settings = {"path": "org/one", "only": "pin"}
    assert answers(hub, settings, {**settings, "revision": COMMIT}) == [COMMIT, COMMIT]
    offline = answers(hub, settings, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set: set data.revision to the commit" in offline[0]


def test_without_the_library_the_command_that_installs_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = find_text(DataConfig(path="corpus/texts"))
    message = r"data\.path='corpus/texts' not found.*pip install 'datasets>=4'"
    with pytest.raises(TextError, match=message):
        text.check()


@pytest.mark.parametrize(
    "path", ["tests/no-such-folder", "nowhere/a.jsonl", "/data/texts", "a/b/c"]
)
def test_a_missing_local_path_is_not_asked_for_on_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(TextError, match=r"not found; expected a file or a folder$"):
        find_text(DataConfig(path=path))
