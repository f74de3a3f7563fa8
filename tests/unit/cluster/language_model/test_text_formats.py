"""Test that every format is read in the forms in which people ship it, and that errors say where.

Each form of a file holds the same documents: `DOCUMENTS`, one null and one blank text.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from cluster.language_model.errors import TextError
from cluster.language_model.text_formats import json_records
from cluster.language_model.texts import Tally, find_text
from conf.schema.data import DataConfig

DOCUMENTS = ["first text", 'zweiter "Text"\nin two, lines', "третий"]
VALUES = [*DOCUMENTS[:2], None, " \n", DOCUMENTS[2]]
RECORDS: list[dict[str, Any]] = [{"id": i, "text": text} for i, text in enumerate(VALUES)]
NESTED: list[dict[str, Any]] = [{"meta": {"lang": "de", "body": text}} for text in VALUES]


def read(path: Path, field: str = "text", **settings: Any) -> tuple[list[str], Tally]:
    tally = Tally()
    text = find_text(DataConfig(path=str(path), text_field=field, **settings))
    text.check()
    return [str(one) for one in text.documents(tally)], tally


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def packed_zstd(content: bytes) -> bytes:
    """Compress in two frames, as compressors do that use several processes."""
    half = len(content) // 2
    frames = []
    for part in (content[:half], content[half:]):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(part)
        frames.append(sink.getvalue().to_pybytes())
    return b"".join(frames)


JSON_FORMS: dict[str, tuple[str, bytes]] = {
    "lines": ("a.jsonl", lines(RECORDS)),
    "lines named json": ("a.json", lines(RECORDS)),
    "lines named ndjson, upper case": ("A.NDJSON", lines(RECORDS)),
    "lines of strings and nulls": ("a.jsonl", lines(VALUES)),
    "lines with Windows line ends and blank lines": (
        "a.jsonl",
        b"\r\n" + lines(RECORDS).replace(b"\n", b"\r\n\r\n"),
    ),
    "a list": ("a.json", json.dumps(RECORDS).encode()),
    "a list, indented": ("a.json", json.dumps(RECORDS, indent=2).encode()),
    "a list named jsonl": ("a.jsonl", json.dumps(RECORDS).encode()),
    "a list of strings": ("a.json", json.dumps(VALUES).encode()),
    "a list with a byte-order mark": ("a.json", b"\xef\xbb\xbf" + json.dumps(RECORDS).encode()),
    "an object of objects": ("a.json", json.dumps({str(r["id"]): r for r in RECORDS}).encode()),
    "columns as lists": ("a.json", json.dumps({"text": VALUES, "id": [*range(5)]}).encode()),
    "columns as pandas writes them": (
        "a.json",
        json.dumps(
            {
                "id": {"0": 1, "1": 2, "2": 3, "3": 4, "4": 5},
                "text": dict(zip("01234", VALUES, strict=True)),
            }
        ).encode(),
    ),
    "gzip": ("a.jsonl.gz", gzip.compress(lines(RECORDS))),
    "gzip, upper case": ("A.JSON.GZ", gzip.compress(lines(RECORDS))),
    "bzip2": ("a.json.bz2", bz2.compress(lines(RECORDS))),
    "xz": ("a.ndjson.xz", lzma.compress(lines(RECORDS))),
    "zstd": ("a.jsonl.zst", packed_zstd(lines(RECORDS))),
    "zstd, a list": ("a.json.zst", packed_zstd(json.dumps(RECORDS).encode())),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_json(tmp_path: Path, form: str) -> None:
    name, content = JSON_FORMS[form]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == (DOCUMENTS, Tally(null=1, blank=1))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_nested_fields_of_json(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(lines(NESTED))
    assert read(tmp_path / name, "meta.body") == (DOCUMENTS, Tally(null=1, blank=1))
    with pytest.raises(TextError, match=r"line 1: .*found .*\['meta.body', 'meta.lang'\]"):
        read(tmp_path / name, "meta.text")


def test_a_field_whose_name_has_a_dot_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"a.b": "right", "a": {"b": "wrong"}}]))
    assert read(tmp_path / "a.jsonl", "a.b")[0] == ["right"]


def test_lists_are_joined_by_newlines_in_all_formats(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"text": ["one", None, "two"]},
        {"text": [None]},
        {"text": []},
        {"text": None},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(records))
    table = pyarrow.table({"text": pyarrow.array([r["text"] for r in records])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name) == (["one\ntwo"], Tally(null=2, blank=1))


def test_the_records_of_a_list_inside_one_object(tmp_path: Path) -> None:
    content = {
        "version": 1,
        "data": [{"p": [{"text": "a"}, {"text": "b"}]}, {"p": [{"text": "c"}]}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read(tmp_path / "a.json", "data.p.text")[0] == ["a\nb", "c"]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_one_document_or_refused_with_its_fields(
    tmp_path: Path, indent: int | None
) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"title": "a title", "body": "a body"}, indent=indent))
    assert read(file, "body")[0] == ["a body"]
    with pytest.raises(TextError, match=r"a\.json.*'text'.*\['body', 'title'\].*text_field='\*'"):
        read(file)
    assert read(file, "*")[0] == ["a title", "a body"]


def test_objects_of_title_and_body_are_refused_in_lists_and_lines(tmp_path: Path) -> None:
    record = {"title": "a title", "body": "a body"}
    for name, content in {
        "list.json": json.dumps([record]),
        "lines.json": f"{json.dumps(record)}\n{json.dumps(record)}",
        "lines.jsonl": json.dumps(record),
    }.items():
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name, "body")[0][0] == "a body"
        with pytest.raises(TextError, match=r"(line|element) 1: .*\['body', 'title'\]"):
            read(tmp_path / name)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_a_list_is_read_in_parts_of_any_size(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "READ_CHARACTERS", size)
    records = [
        *RECORDS,
        {"text": "x" * 300, "n": -1.5e3, "l": [1, {"a": []}]},
        " w ",
        {"text": "]"},
    ]
    for indent in (None, 3):
        (tmp_path / "a.json").write_text(json.dumps(records, indent=indent) + "\n ")
        assert read(tmp_path / "a.json")[0] == [*DOCUMENTS, "x" * 300, " w ", "]"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '["a", "b" "c"]', "element 2: expected a comma or the end of the list"),
        ("a.json", '["a", nope]', "element 2: expected JSON"),
        ("a.json", '["a", {"text": "b"}', "element 3: expected JSON"),
        ("a.json", '["a"]\n["b"]', "expected the end of the file after the JSON list"),
        ("a.json", '["a", 3]', r"element 2: .*type are int"),
        ("a.json", '["a", {"text": 3}]', r"element 2: .*found int '3'"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', "line 3: expected JSON"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', r"line 2: .*\['txt'\]"),
        ("a.jsonl", '{\n "text": "a"\n}', "line 1: expected JSON"),
        ("a.jsonl", '{"text": "a"}\n{"text": {"en": "b"}}', r"line 2: .*\['en'\]"),
        ("a.json", '{"text": "a"', "expected JSON"),
        ("a.json", '{"a": ' * 100_000, "expected JSON"),
        ("a.csv", "id,text\n1,a\n2,b,c\n", r"line 3: expected 2 values as in the header, found 3"),
        ("a.csv", 'id,text\n1,a\n2,"b\n', r"line \d: expected values .*unexpected end of data"),
        ("a.csv", "id,body\n1,a\n", r"text_field='text': .*no such column in \['id', 'body'\]"),
        ("a.csv", "text,text\n1,a\n", "several columns of this name"),
    ],
)
def test_errors_name_the_file_and_the_place(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=rf"{name}.*{message}"):
        list(find_text(DataConfig(path=str(tmp_path / name))).documents())


def table_text(separator: str) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=separator)
    writer.writerow(["id", "text", "note"])
    writer.writerows([i, text, f"x{separator}y"] for i, text in enumerate(VALUES))
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "separator", "encoding"),
    [
        ("a.csv", ",", "utf-8"),
        ("a.csv", ",", "utf-8-sig"),  # as Excel writes it
        ("a.csv", ";", "utf-8"),  # as Excel writes it in many countries
        ("A.TSV", "\t", "utf-8"),
        ("a.csv.gz", ",", "utf-8"),
    ],
)
def test_tables_of_text(tmp_path: Path, name: str, separator: str, encoding: str) -> None:
    content = table_text(separator).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == (DOCUMENTS, Tally(null=0, blank=2))  # CSV has no nulls


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 500_000 + "\n")
    assert read(tmp_path / "a.csv")[0] == ["x" * 500_000]


STRINGS = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


def write_parquet(table: Any, folder: Path) -> Path:
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    return folder / "a.parquet"


def write_arrow_stream(table: Any, folder: Path) -> Path:
    with pyarrow.ipc.new_stream(folder / "a.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return folder / "a.arrow"


def write_arrow_file(table: Any, folder: Path) -> Path:
    with pyarrow.ipc.new_file(folder / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    return folder / "a.arrow"


def write_feather(table: Any, folder: Path) -> Path:
    pyarrow.feather.write_feather(table, folder / "a.feather", compression="zstd")
    return folder / "a.feather"


WRITERS = [write_parquet, write_arrow_stream, write_arrow_file, write_feather]


@pytest.mark.parametrize("kind", STRINGS)
@pytest.mark.parametrize("write", WRITERS)
def test_columns_of_every_string_type(
    tmp_path: Path, kind: str, write: Callable[[Any, Path], Path]
) -> None:
    values = pyarrow.array(VALUES, pyarrow.string())
    column = values.dictionary_encode() if kind == "dictionary" else values.cast(STRINGS[kind])
    table = pyarrow.table({"id": range(5), "text": column})
    assert read(write(table, tmp_path)) == (DOCUMENTS, Tally(null=1, blank=1))


@pytest.mark.parametrize("write", WRITERS)
def test_nested_columns(tmp_path: Path, write: Callable[[Any, Path], Path]) -> None:
    turns = [[{"role": "user", "content": text}, {"role": "x", "content": "z"}] for text in VALUES]
    table = pyarrow.table(
        {"meta": pyarrow.array([r["meta"] for r in NESTED]), "turns": pyarrow.array(turns)}
    )
    file = write(table, tmp_path)
    assert read(file, "meta.body") == (DOCUMENTS, Tally(null=1, blank=1))
    assert read(file, "turns.content")[0][0] == "first text\nz"
    with pytest.raises(TextError, match=r"'meta.lang', 'meta.body', 'turns.role', 'turns.content'"):
        read(file, "meta.text")
    with pytest.raises(TextError, match="has the type struct"):
        read(file, "meta")


@pytest.mark.parametrize("write", WRITERS)
def test_a_cut_table_is_named(tmp_path: Path, write: Callable[[Any, Path], Path]) -> None:
    file = write(pyarrow.table({"text": ["word " * 50] * 500}), tmp_path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(TextError, match=rf"could not read .*{file.name}"):
        read(file)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": packed_zstd,
    }
    content = bytearray(pack[suffix](lines([{"text": f"number {i}"} for i in range(2000)])))
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[:40] = b"\x00" * 40
    file = tmp_path / f"a.jsonl.{suffix}"
    file.write_bytes(content)
    with pytest.raises(TextError, match=rf"could not read .*a\.jsonl\.{suffix}: "):
        list(find_text(DataConfig(path=str(file))).documents())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "cp1251", "utf-16-le"])
def test_other_encodings_are_told_and_read_when_named(
    tmp_path: Path, name: str, encoding: str
) -> None:
    text = {
        "a.txt": "первый\n\nвторой\n",
        "a.jsonl": '{"text": "первый"}\n{"text": "второй"}\n',
        "a.csv": "id,text\n1,первый\n2,второй\n",
    }[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(TextError, match=rf"{name}.* is not UTF-8 text.*set data\.encoding"):
        read(tmp_path / name)
    documents, _ = read(tmp_path / name, encoding=encoding)
    assert [document.strip() for document in documents] == ["первый", "второй"]


def test_the_line_of_a_bad_character_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["a", "b"]) + '"schön"\n'.encode("latin-1"))
    message = r"a\.jsonl, line 3: the file is not UTF-8 text .*data\.encoding.*iconv"
    with pytest.raises(TextError, match=message):
        list(find_text(DataConfig(path=str(tmp_path / "a.jsonl"))).documents())


def test_a_compressed_file_without_its_suffix_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(lines(RECORDS)))
    with pytest.raises(TextError, match=r"compressed with gzip; rename it to end in \.gz"):
        read(tmp_path / "a.jsonl")


def test_a_byte_order_mark_is_no_text_and_changes_the_hash(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    text = find_text(DataConfig(path=str(tmp_path / "a.txt")))
    assert list(text.documents()) == ["one\n", "two"]
    # A store of an earlier version has the mark among its tokens: its text is another one.
    (tmp_path / "b.txt").write_bytes(b"one\n\ntwo")
    assert text.sha256(tmp_path / "c") != find_text(
        DataConfig(path=str(tmp_path / "b.txt"))
    ).sha256(tmp_path / "c")
