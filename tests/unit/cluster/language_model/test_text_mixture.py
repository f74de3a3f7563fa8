"""Test mixtures of texts: shares, order, where they end, hash and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.harvest.provenance import mixed_texts
from cluster.language_model.errors import TextError
from cluster.language_model.texts import Tally, find_text
from conf.schema.data import DataConfig, MixedText
from foundation.errors import ConfigError


def write(folder: Path, name: str, number: int, words: int) -> str:
    """Write a JSON Lines file of `number` documents, and return its path."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": name * words}) + "\n" for _ in range(number)))
    return str(file)


def mixed(
    first: str, *others: tuple[str, float], weight: float = 1.0, **settings: Any
) -> DataConfig:
    mixture = [MixedText(path, share) for path, share in others]
    return DataConfig(path=first, weight=weight, mixture=mixture, **settings)


def test_the_shares_of_the_characters_follow_the_weights_throughout(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", 1000, 7), write(tmp_path, "b", 1000, 30)
    documents = list(find_text(mixed(a, (b, 1.0), weight=3.0)).documents())
    characters = {"a": 0, "b": 0}
    for text in documents:
        characters[text[0]] += len(text)
        # Never further from its share than one document of either text.
        assert abs(characters["a"] - 0.75 * sum(characters.values())) <= 30
    assert characters["a"] == 7000  # all of it


def test_the_mixture_ends_with_the_text_that_ends_first(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", 5, 10), write(tmp_path, "b", 100, 10)
    tally = Tally()
    documents = list(find_text(mixed(a, (b, 2.0))).documents(tally))
    assert documents.count("a" * 10) == 5 and 9 <= documents.count("b" * 10) <= 11
    assert tally.ended_by == a and tally.parts == {a: 5, b: len(documents) - 5}


def test_the_order_is_the_same_every_time_and_depends_on_relative_weights_alone(
    tmp_path: Path,
) -> None:
    a, b = write(tmp_path, "a", 40, 11), write(tmp_path, "b", 40, 13)
    one, two = (mixed(a, (b, 2.0 * scale), weight=scale) for scale in (1.0, 3.0))
    assert list(find_text(one).documents()) == list(find_text(two).documents())
    assert find_text(one).sha256(tmp_path / "c") == find_text(two).sha256(tmp_path / "c")


def test_the_hash_follows_texts_and_weights(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path, name, 4, 3) for name in "abc")
    configs = [DataConfig(path=a), mixed(a, (b, 1.0)), mixed(a, (b, 2.0)), mixed(b, (a, 1.0))]
    configs += [mixed(a, (c, 1.0)), mixed(a, (b, 1.0), max_documents=3)]
    hashes = {find_text(config).sha256(tmp_path / "cache") for config in configs}
    assert len(hashes) == len(configs)


def test_the_texts_of_a_mixture_may_have_other_fields_and_formats(tmp_path: Path) -> None:
    a = write(tmp_path, "a", 3, 4)
    (tmp_path / "b.csv").write_text("id,body\n1,bbbb\n2,bbbb\n")
    other = MixedText(str(tmp_path / "b.csv"), text_field="body")
    text = find_text(DataConfig(path=a, mixture=[other]))
    text.check()
    assert sorted({*text.documents()}) == ["aaaa", "bbbb"]
    assert [line.split("%")[0] for line in text.summary()] == ["50.0", "50.0"]


def test_an_unreadable_or_empty_text_of_a_mixture_is_named(tmp_path: Path) -> None:
    a = write(tmp_path, "a", 3, 4)
    with pytest.raises(TextError, match=r"data\.mixture\[0\]\.path=.*nowhere.*not found"):
        find_text(mixed(a, (str(tmp_path / "nowhere"), 1.0)))
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(TextError, match=r"e\.jsonl' contains no documents"):
        list(find_text(mixed(a, (str(tmp_path / "e.jsonl"), 1.0))).documents())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mixed("a", ("b", 0.0)), r"data\.mixture\[0\]\.weight=0\.0: expected a finite number"),
        (mixed("a", ("b", float("nan"))), r"data\.mixture\[0\]\.weight"),
        (mixed("a", ("b", 1.0), weight=-1.0), r"data\.weight=-1\.0"),
        (mixed("a", ("", 1.0)), "a path in every entry"),
        (mixed("a", ("b", 1.0), ("b", 2.0)), "give it a larger weight"),
        (mixed("a", weight=2.0), r"data\.weight=2\.0: expected 1 without data\.mixture"),
        (DataConfig(path="a", encoding="utf-9"), r"data\.encoding='utf-9'"),
        (DataConfig(path="a", encoding="base64"), r"data\.encoding='base64'"),
        (DataConfig(path="a", max_documents=0), r"data\.max_documents=0"),
        (DataConfig(path="a", streaming=True), r"data\.streaming=True: .*data\.max_documents"),
        (DataConfig(path="a", heldout="all"), r"data\.heldout='all': .*documents, tokens, none"),
    ],
)
def test_settings_are_validated(config: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.validate()


def test_headers_name_all_texts() -> None:
    data = mixed("org/a", ("/data/b", 0.5), weight=2.0)
    assert mixed_texts(data)["dataset_mixture"] == [
        {"dataset": "org/a", "weight": 2.0},
        {"dataset": "/data/b", "weight": 0.5},
    ]
    assert mixed_texts(DataConfig(path="a")) == {}
