"""Test every kind of text source: its documents, their order, its hash."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cluster.language_model.errors import TextError
from cluster.language_model.text_formats import TEXT_FORMATS, Reading, TextFormat, open_text
from cluster.language_model.texts import find_text
from cluster.language_model.tokens.contexts import prepare_contexts
from conf.schema.data import DataConfig
from tests.support.tiny_models import save_tokenizer

HASHES = {
    ("a.jsonl", "c.json"): "7aaeff35896a3892755c7be6bf2e65f46a8e68e3704357a1fffc129008583727",
    ("b.txt", "d.md"): "45f5cbaf530121c44b3c922ce4c18119d6d1d3bf41d6a5f09758d1d9c6a6a826",
    ("a.jsonl",): "3dd5327ef04235e95ddaf9646ab83db146b431684ad5265fcec8403209ebb4a7",
}
"""Names of files with the same content -> hash of a folder of them, as earlier versions had it."""
DOCUMENTS = ["first text", "zweiter Text\nin two lines", "третий"]


def read(path: Path, field: str = "text") -> list[str]:
    return [str(one) for one in find_text(DataConfig(path=str(path), text_field=field)).documents()]


def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\ntwo\n\n \n\nthree")
    assert read(tmp_path / "a.txt") == ["one\ntwo\n", "three"]


def test_a_folder_gives_one_document_per_text_file_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("bee\n\nstill bee")
    (tmp_path / "a.md").write_text("ay")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == ["ay", "bee\n\nstill bee"]


def test_json_lines_plain_and_gzipped(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text, "id": 1}) for text in DOCUMENTS)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(lines)
    assert read(tmp_path / "a.jsonl") == DOCUMENTS
    assert read(tmp_path / "b.jsonl.gz") == DOCUMENTS


@pytest.mark.parametrize(
    "value",
    [
        DOCUMENTS,
        [{"text": text} for text in DOCUMENTS],
        {str(i): {"text": text} for i, text in enumerate(DOCUMENTS)},
    ],
)
def test_json_lists_and_objects(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read(tmp_path / "a.json") == DOCUMENTS


def test_a_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "bad \ud800 half"}')
    assert read(tmp_path / "a.jsonl") == ["bad ? half"]


def test_parquet_skips_nulls(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [*DOCUMENTS, None], "n": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == DOCUMENTS
    with pytest.raises(TextError, match=r"column .*'body' not found; use one of its .*'text', 'n'"):
        read(tmp_path / "a.parquet", "body")
    with pytest.raises(TextError, match="int64; expected strings"):
        read(tmp_path / "a.parquet", "n")


def test_a_saved_hugging_face_dataset(tmp_path: Path) -> None:
    train = tmp_path / "train"
    train.mkdir()
    for number, part in enumerate((DOCUMENTS[:2], DOCUMENTS[2:])):
        table = pyarrow.table({"text": part})
        with pyarrow.ipc.new_stream(train / f"data-{number}.arrow", table.schema) as stream:
            stream.write_table(table)
    files = [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]
    (train / "state.json").write_text(json.dumps({"_data_files": files}))
    (train / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert read(tmp_path) == [*DOCUMENTS[2:], *DOCUMENTS[:2]]


def test_the_hash_follows_names_content_and_field(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"

    def sha256(field: str = "text") -> str:
        return find_text(DataConfig(path=str(file), text_field=field)).sha256(tmp_path / "cache")

    file.write_text('{"text": "a"}')
    first = sha256()
    assert sha256() == first
    assert sha256("body") != first
    file.write_text('{"text": "b"}')
    assert sha256() != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"", "expected a file of one of the formats"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\nnope', "line 2: expected JSON"),
        (
            "a.jsonl",
            b'{"title": "x"}',
            r"expected text in the field data.text_field='text' of .*; found a document whose "
            r"fields or type are \['title'\]",
        ),
        ("a.json", b"3", r"line 1: expected text in the field .*type are int"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read(tmp_path / name)


def test_missing_sources_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="not found; expected a file or a folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match="expected a folder with files of"):
        read(tmp_path / "empty")
    with pytest.raises(TextError, match="pip install --no-deps no-such-package"):
        find_text(DataConfig(package="no_such_package", path="x"))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_must_not_be_compressed(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}.gz"
    file.write_bytes(b"")
    (tmp_path / "b.txt").write_text("text")
    for path in (file, tmp_path):
        with pytest.raises(
            TextError, match=rf"a\{suffix}\.gz: \{suffix} files must not be compressed"
        ):
            read(path)


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(json.dumps({"text": "word " * 100}).encode()))
    content[10] = 0xFF  # an invalid type of block
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(TextError, match=r"could not read .*a\.jsonl\.gz"):
        read(tmp_path / "a.jsonl.gz")


def test_a_file_of_a_dataset_must_have_a_format(tmp_path: Path) -> None:
    files = [{"filename": "data-0.bin"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    with pytest.raises(TextError, match=r"data-0\.bin: expected a file of one of the formats"):
        read(tmp_path)


def test_the_hash_of_a_folder_stays_what_it_was(tmp_path: Path) -> None:
    # Stores record this hash: a store harvested before must still match its text.
    for names, hash_before in HASHES.items():
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).write_text('{"text": "x"}')
        source = find_text(DataConfig(path=str(folder)))
        assert source.sha256(tmp_path / "cache") == hash_before
        if len(names) == 1:
            file = find_text(DataConfig(path=str(folder / names[0])))
            assert file.sha256(tmp_path / "cache") == hash_before


class Semicolons(TextFormat):
    """A toy format: values separated by semicolons, with a header."""

    suffixes: tuple[str, ...] = (".scsv",)
    may_be_compressed = True

    def documents(self, file: Path, reading: Reading) -> Iterator[str]:
        with open_text(file, reading.encoding) as lines:
            rows = csv.DictReader(lines, delimiter=";")
            yield from (row[reading.field] for row in rows)


def test_another_format_is_read_like_the_built_in_ones(tmp_path: Path) -> None:
    text = 'id;text\n1;w0 w1 w2 w3\n2;" "\n3;"w4 w5 w6 w7 w8"\n'
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.scsv").write_text(text)
    (tmp_path / "texts" / "b.txt").write_text("w9 w9")
    with gzip.open(tmp_path / "a.scsv.gz", "wt") as stream:
        stream.write(text)
    data = DataConfig(path=str(tmp_path / "a.scsv.gz"), context_tokens=8, heldout_fraction=1e-9)
    with pytest.raises(TextError, match=r"expected a file of one of the formats .*\.arrow"):
        find_text(data)
    with TEXT_FORMATS.registered("scsv", Semicolons()):
        assert read(tmp_path / "a.scsv.gz") == ["w0 w1 w2 w3", "w4 w5 w6 w7 w8"]
        assert read(tmp_path / "texts") == ["w0 w1 w2 w3", "w4 w5 w6 w7 w8"]  # data files win
        contexts = prepare_contexts(data, save_tokenizer(tmp_path / "tok"), tmp_path / "cache")
    assert contexts.train.token_id.tolist() == [[3, 4, 5, 6, 1, 7, 8]]


def test_two_formats_of_one_suffix_are_refused(tmp_path: Path) -> None:
    class AlsoText(Semicolons):
        suffixes = (".scsv", ".txt")

    (tmp_path / "a.txt").write_text("text")
    message = "text formats 'plain' and 'also' both read .txt files"
    with TEXT_FORMATS.registered("also", AlsoText()), pytest.raises(TextError, match=message):
        read(tmp_path / "a.txt")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(TextError, match=r"pipe\.txt' is neither a file nor a folder"):
        find_text(DataConfig(path=str(tmp_path / "pipe.txt")))
