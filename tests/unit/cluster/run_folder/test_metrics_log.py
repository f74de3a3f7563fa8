"""Test the log of training metrics: torn lines, repeated steps, several SAEs, new rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.run_folder.files import METRICS
from cluster.run_folder.metrics_log import (
    MetricsWriter,
    NewRows,
    last_row,
    logged_rows,
    read_training_log,
)

TORN = '{"step": 3, "lo'


def write(run_dir: Path, *rows: dict[str, object]) -> None:
    log = MetricsWriter(run_dir)
    for row in rows:
        log.write(row)
    log.close()


def append(run_dir: Path, text: str) -> None:
    with (run_dir / METRICS).open("a") as file:
        file.write(text)


def test_an_empty_run_has_no_rows(tmp_path: Path) -> None:
    for _ in range(2):
        assert not read_training_log(tmp_path) and last_row(tmp_path) is None
        assert list(logged_rows(tmp_path)) == NewRows(tmp_path).read() == []
        (tmp_path / METRICS).touch()
    write(tmp_path, {"step": 1})
    assert (tmp_path / METRICS).read_text() == '{"step": 1}\n'  # no blank line before it


def test_a_torn_line_is_ended_by_the_next_writer_and_skipped_by_all_readers(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1}, {"step": 2})
    new = NewRows(tmp_path)
    append(tmp_path, TORN)
    assert last_row(tmp_path) == {"step": 2} and new.read() == []
    write(tmp_path, {"step": 3})
    assert (tmp_path / METRICS).read_text().splitlines()[2] == TORN
    assert [row["step"] for row in logged_rows(tmp_path)] == [1, 2, 3]
    assert new.read() == [{"step": 3}] and new.read() == []
    log = read_training_log(tmp_path)
    assert [row["step"] for row in log.rows["sae"]] == [1, 2, 3] and log.unreadable_lines == 1


def test_a_row_is_read_once_its_line_is_complete(tmp_path: Path) -> None:
    new = NewRows(tmp_path)
    append(tmp_path, '{"step": 1}\n{"step"')
    assert new.read() == [{"step": 1}]
    append(tmp_path, ': 2}\n\n{"step": 3}\n')
    assert new.read() == [{"step": 2}, {"step": 3}]


def test_the_last_of_repeated_steps_counts_for_each_sae(tmp_path: Path) -> None:
    a, b = {"sae": "a"}, {"sae": "b"}
    write(tmp_path, a | {"step": 2, "fvu": 0.5}, b | {"step": 2, "fvu": 0.7}, a | {"step": 3})
    write(tmp_path, a | {"step": 2, "fvu": 0.4})
    assert (tmp_path / METRICS).read_text().count("\n") == 4  # a whole line is not ended again
    rows = read_training_log(tmp_path).rows
    assert [(row["step"], row.get("fvu")) for row in rows["a"]] == [(2, 0.4), (3, None)]
    assert [row["fvu"] for row in rows["b"]] == [0.7]
    assert [row["step"] for row in logged_rows(tmp_path)] == [2, 2, 3, 2]
    assert last_row(tmp_path) == a | {"step": 2, "fvu": 0.4}


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    log = MetricsWriter(tmp_path)
    row = {"step": 1, "fvu": float("nan"), "lr": float("inf"), "l0": 4.0}
    assert log.write(row) == {"step": 1, "fvu": None, "lr": None, "l0": 4.0} == last_row(tmp_path)
    log.close()


@pytest.mark.parametrize("line", ["[1]", '"step"', "{}", '{"step": "1"}', "[" * 10**4, "\x00"])
def test_foreign_lines_are_skipped(tmp_path: Path, line: str) -> None:
    append(tmp_path, f'{{"step": 1}}\n{line}\n')
    assert last_row(tmp_path) == {"step": 1} and list(logged_rows(tmp_path)) == [{"step": 1}]
    assert read_training_log(tmp_path).unreadable_lines == 1


def test_the_last_row_is_found_without_reading_the_whole_file(tmp_path: Path) -> None:
    append(tmp_path, (json.dumps({"step": 1, "text": "x" * 100}) + "\n") * 5000)
    append(tmp_path, '{"step": 2}\n' + TORN)
    with (tmp_path / METRICS).open("r+b") as file:
        file.write(b"\xff" * 1000)  # damage at the beginning does not matter
    assert last_row(tmp_path) == {"step": 2}
    append(tmp_path, "x" * (1 << 16))
    assert last_row(tmp_path) is None  # it looks no further back
