"""Test which files of a folder are read as documents, and that the others are reported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cluster.language_model.errors import TextError
from cluster.language_model.texts import find_text
from conf.schema.data import DataConfig, MixedText


def write(folder: Path, *names: str) -> None:
    """Write files that each hold one document, the name of the file."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), file)
        elif file.suffix == ".csv":
            file.write_text(f"text\n{name}\n")
        else:
            file.write_text(json.dumps({"text": name}) if ".json" in name else name)


def read(folder: Path, **settings: Any) -> list[str]:
    return [str(one) for one in find_text(DataConfig(path=str(folder), **settings)).documents()]


def told(folder: Path, **settings: Any) -> str:
    return "\n".join(find_text(DataConfig(path=str(folder), **settings)).summary())


@pytest.mark.parametrize("data", ["a.jsonl", "a.parquet", "a.txt", "a.csv"])
@pytest.mark.parametrize(
    "other",
    [
        "README.md",
        "readme.txt",
        "LICENSE",
        "LICENSE.txt",
        ".cache/huggingface/download/a.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        ".ipynb_checkpoints/a-checkpoint.txt",
        ".hidden.jsonl",
        "__MACOSX/._a.jsonl",
        "inner/.git/config.txt",
        "dataset_infos.json",
        "dataset_info.json",
        "Thumbs.db",
    ],
)
def test_files_that_are_no_documents_are_left_out_and_told(
    tmp_path: Path, data: str, other: str
) -> None:
    write(tmp_path, data, other)
    assert read(tmp_path) == [data]
    assert "skipped" in told(tmp_path)


def test_an_empty_path_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=r"data\.path is empty; expected a file"):
        find_text(DataConfig(path=""))
    with pytest.raises(TextError, match=r"data\.mixture\[0\]\.path is empty"):
        find_text(DataConfig(path="a.jsonl", mixture=[MixedText()]))


def test_a_hidden_folder_can_be_read_when_it_is_named(tmp_path: Path) -> None:
    write(tmp_path / ".data", "a.jsonl")
    assert read(tmp_path / ".data") == ["a.jsonl"]


def test_data_files_win_over_plain_text(tmp_path: Path) -> None:
    write(tmp_path, "urls.txt", "notes.md", "a.jsonl", "b.json")
    assert read(tmp_path) == ["a.jsonl", "b.json"]
    assert "skipped, plain text next to data files: notes.md, urls.txt" in told(tmp_path)
    assert read(tmp_path, files="*.txt") == ["urls.txt"]


def test_several_formats_of_data_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "a.parquet", "b.parquet")  # the same data twice
    with pytest.raises(TextError, match=r"found 1 \.jsonl, 2 \.parquet.*data\.files='\*\.jsonl'"):
        read(tmp_path)
    assert read(tmp_path, files="*.parquet") == ["a.parquet", "b.parquet"]


def test_a_folder_without_documents_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, "README.md", "picture.png", ".a.jsonl")
    message = r"found none.*hidden: \.a\.jsonl.*descriptions of the data: README\.md.*picture\.png"
    with pytest.raises(TextError, match=message):
        read(tmp_path)
    with pytest.raises(TextError, match=r"that match data\.files='\*\.csv'; found none"):
        read(tmp_path, files="*.csv")


def test_a_pattern_chooses_files_in_inner_folders(tmp_path: Path) -> None:
    write(tmp_path, "en/a.jsonl", "en/deep/b.jsonl", "fr/a.jsonl", "c.jsonl", "en/.d.jsonl")
    assert read(tmp_path, files="en/*.jsonl") == ["en/a.jsonl", "en/deep/b.jsonl"]
    assert read(tmp_path, subset="fr") == ["fr/a.jsonl"]
    with pytest.raises(TextError, match=r"data\.subset='de': .*\['en', 'fr'\]"):
        read(tmp_path, subset="de")
    with pytest.raises(TextError, match=r"data\.subset"):
        read(tmp_path / "en", subset="../fr")


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "b.jsonl")
    write(tmp_path / "data", "a.jsonl")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert read(tmp_path / "data") == ["a.jsonl", "b.jsonl"]


HUB = (
    "data/train-00000-of-00002.parquet",
    "data/train-00001-of-00002.parquet",
    "data/validation-00000-of-00001.parquet",
    "data/test-00000-of-00001.parquet",
)


def test_a_snapshot_of_the_hub_gives_its_train_split(tmp_path: Path) -> None:
    write(tmp_path, *HUB, "README.md", ".gitattributes", "dataset_infos.json")
    assert read(tmp_path) == [*HUB[:2]]
    assert "other splits (data.split): 1 of test, 1 of validation" in told(tmp_path)
    assert read(tmp_path, split="validation") == [HUB[2]]
    assert len(read(tmp_path, split="all")) == 4
    with pytest.raises(TextError, match=r"data\.split='dev2'.*'test', 'train', 'validation'"):
        read(tmp_path, split="dev2")


def test_a_repository_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["blob"]}), blob)
    snapshot = tmp_path / "snapshots" / "c0ffee" / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "train-00000-of-00001.parquet").symlink_to(os.path.relpath(blob, snapshot))
    assert read(tmp_path) == ["blob"]
    (tmp_path / "snapshots" / "decaf0").mkdir()
    with pytest.raises(TextError, match=r"with 2 snapshots; set data\.path to"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["en/train/1.jsonl", "en/test/1.jsonl"], ["en/train/1.jsonl"]),
        (["stories-train.txt", "stories-valid.txt"], ["stories-train.txt"]),
        (["test.txt", "trains.txt", "zebra.txt"], ["test.txt", "trains.txt", "zebra.txt"]),
        (["test.jsonl"], ["test.jsonl"]),
    ],
)
def test_names_tell_splits_only_if_all_do(
    tmp_path: Path, names: list[str], chosen: list[str]
) -> None:
    write(tmp_path, *names)
    assert read(tmp_path) == chosen


def test_names_like_splits_among_others_are_told(tmp_path: Path) -> None:
    write(tmp_path, "corpus.jsonl", "test.jsonl")
    printed = told(tmp_path)
    assert "read like all others, although these names look like splits: test.jsonl" in printed


def test_splits_without_train_must_be_chosen(tmp_path: Path) -> None:
    write(tmp_path, "test.jsonl", "dev.jsonl")
    with pytest.raises(TextError, match=r"the splits \['test', 'validation'\]; .*data\.split"):
        read(tmp_path)
    assert read(tmp_path, split="test") == ["test.jsonl"]


CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*.parquet
  - split: test
    path: [en/test-*.parquet]
- config_name: de
  data_files: "de/*.parquet"
- config_name: not_downloaded
  data_files: "fr/*.parquet"
---
# A data set
"""
DECLARED = ("en/train-0.parquet", "en/train-1.parquet", "en/test-0.parquet", "de/part.parquet")


def test_the_card_of_a_snapshot_declares_subsets_and_splits(tmp_path: Path) -> None:
    write(tmp_path, *DECLARED)
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(TextError, match=r"has the subsets \['en', 'de'\]; .*data\.subset"):
        read(tmp_path)
    assert read(tmp_path, subset="en") == [*DECLARED[:2]]
    assert "subset en, split train, of those in README.md" in told(tmp_path, subset="en")
    assert read(tmp_path, subset="en", split="test") == [DECLARED[2]]
    assert read(tmp_path, subset="en", split="all") == sorted(DECLARED[:3])
    assert read(tmp_path, subset="de") == [DECLARED[3]]
    with pytest.raises(TextError, match=r"data\.split='dev': .*\['test', 'train'\]"):
        read(tmp_path, subset="en", split="dev")
    with pytest.raises(TextError, match=r"data\.subset='fr': expected one of \['en', 'de'\]"):
        read(tmp_path, subset="fr")
    assert read(tmp_path, files="de/*") == [DECLARED[3]]  # the user's choice comes first
    (tmp_path / "README.md").write_text(CARD.replace("name: de\n", "name: de\n  default: true\n"))
    assert read(tmp_path) == [DECLARED[3]]


@pytest.mark.parametrize(
    "card",
    [
        "# no metadata",
        "---\nconfigs: 3\n---\n",
        "---\n- [\n---\n",
        "---\nconfigs:\n- config_name: a\n  data_files: ../*.txt\n- config_name: b\n"
        "  data_files: hf://datasets/x/y.parquet\n---\n",
    ],
)
def test_a_card_that_declares_no_files_inside_the_folder_changes_nothing(
    tmp_path: Path, card: str
) -> None:
    write(tmp_path / "data", "a.jsonl")
    write(tmp_path, "outside.txt")
    (tmp_path / "data" / "README.md").write_text(card)
    assert read(tmp_path / "data") == ["a.jsonl"]


def save(folder: Path, *texts: str) -> None:
    folder.mkdir(parents=True)
    table = pyarrow.table({"text": [*texts]})
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_the_split_of_a_saved_dataset(tmp_path: Path) -> None:
    for name in ("test", "train"):
        save(tmp_path / name, f"of {name}")
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert read(tmp_path) == ["of train"]
    assert read(tmp_path, split="test") == ["of test"]
    assert read(tmp_path, split="all") == ["of train", "of test"]
    with pytest.raises(TextError, match=r"data\.split='dev'.*\['train', 'test'\]"):
        read(tmp_path, split="dev")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "a/../../b.arrow", ""])
def test_a_saved_dataset_must_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    save(tmp_path / "secret", "secret")
    save(tmp_path / "data", "mine")
    state = {"_data_files": [{"filename": name}]}
    (tmp_path / "data" / "state.json").write_text(json.dumps(state))
    with pytest.raises(TextError, match=r"state\.json names .*: expected a file or folder inside"):
        read(tmp_path / "data")
    dictionary = {"splits": ["../secret"]}
    (tmp_path / "data" / "dataset_dict.json").write_text(json.dumps(dictionary))
    with pytest.raises(TextError, match=r"dataset_dict\.json names '\.\./secret'"):
        read(tmp_path / "data")


def test_a_missing_or_damaged_file_is_told_by_the_hash_too(tmp_path: Path) -> None:
    save(tmp_path / "data", "mine")
    (tmp_path / "data" / "data-00000-of-00001.arrow").unlink()
    (tmp_path / "a.jsonl.xz").write_bytes(b"nothing of this kind")
    for path, name in (("data", "data-00000-of-00001.arrow"), ("a.jsonl.xz", "a.jsonl.xz")):
        with pytest.raises(TextError, match=rf"could not read .*{name}: "):
            find_text(DataConfig(path=str(tmp_path / path))).sha256(tmp_path / "cache")


@pytest.mark.parametrize("state", ["nope", "[]", '{"_data_files": [{}]}', '{"_data_files": 3}'])
def test_damaged_metadata_of_a_saved_dataset_is_told(tmp_path: Path, state: str) -> None:
    save(tmp_path / "data", "mine")
    (tmp_path / "data" / "state.json").write_text(state)
    with pytest.raises(TextError, match=r"state\.json: expected"):
        read(tmp_path / "data")


def test_a_file_and_a_folder_with_only_it(tmp_path: Path) -> None:
    """A plain file is cut at blank lines, but not in a folder: their hashes must differ."""
    for name, content in {"a.txt": "one\n\ntwo", "a.jsonl": '"one"\n"two"'}.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(content)
        alone, inside = (find_text(DataConfig(path=str(p))) for p in (folder / name, folder))
        same = list(alone.documents()) == list(inside.documents())
        assert same == (name == "a.jsonl")
        cache = tmp_path / "cache"
        assert (alone.sha256(cache) == inside.sha256(cache)) == same


def test_choices_that_one_file_does_not_have_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    for key in ("files", "subset", "split"):
        with pytest.raises(TextError, match=rf"data\.{key}='x' chooses from a folder"):
            read(tmp_path / "a.jsonl", **{key: "x"})
    with pytest.raises(TextError, match=r"data\.revision='x' is for data sets on the Hub"):
        read(tmp_path, revision="x")
    with pytest.raises(TextError, match=r"data\.streaming=true is for data sets on the Hub"):
        read(tmp_path, streaming=True, max_documents=3)


def test_the_files_are_listed_shortly(tmp_path: Path) -> None:
    write(tmp_path, *(f"part-{i:03}.jsonl" for i in range(40)))
    (tmp_path / "part-020.jsonl").write_text("")
    line, empty = told(tmp_path).splitlines()
    assert line.startswith("40 files, ") and line.count("part-") == 6 and "part-039" in line
    assert empty == "files without content: 1"


def test_the_first_documents_only(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl")
    whole, two = (find_text(DataConfig(path=str(tmp_path), max_documents=n)) for n in (None, 2))
    assert list(two.documents()) == ["a.jsonl", "b.jsonl"]
    assert whole.sha256(tmp_path / "c") != two.sha256(tmp_path / "c")


def test_files_that_were_not_downloaded_are_told(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("../blobs/0123")
    with pytest.raises(TextError, match=r"b\.jsonl: .*link to '\.\./blobs/0123', which does not"):
        read(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    for name in ("b.jsonl", "b.parquet", "b.txt"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(TextError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            read(folder)


def test_a_pattern_as_path_is_told_how_to_write_it(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    with pytest.raises(
        TextError, match=r"set data\.path to the folder and data\.files='\*\.jsonl'"
    ):
        read(tmp_path / "*.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "inner/b.jsonl")
    (tmp_path / "inner").chmod(0)
    try:
        with pytest.raises(TextError, match=r"could not read the folder .*inner"):
            read(tmp_path)
    finally:
        (tmp_path / "inner").chmod(0o700)
