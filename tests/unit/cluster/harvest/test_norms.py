"""Test the limit on norms: its value, the rows above it, and what is said about them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.harvest.norms import (
    NormStatistics,
    dropped_line,
    max_norms,
    norm_statistics,
    statistics_line,
    within,
)
from conf.schema.data import DataConfig
from foundation.errors import ConfigError

TOKENIZER: Any = SimpleNamespace(decode=lambda ids: f"t{ids[0]}")


def test_rows_above_the_limit_at_any_hookpoint_are_left_out() -> None:
    rows = {"a": np.ones((5, 4), np.float32), "b": np.full((5, 9), 2, np.float32)}
    rows["a"][1] *= 11  # norm 22, median 2
    rows["b"][3] *= 10.5  # norm 63, median 6
    sidecars = {"token_id": np.arange(5) + 40, "position": np.arange(5) * 7}
    statistics = norm_statistics(rows, sidecars)
    assert statistics == {"a": NormStatistics(2, 22, 41, 7), "b": NormStatistics(6, 63, 43, 21)}
    limits = max_norms(statistics, 10.0)
    assert limits == {"a": 20, "b": 60}
    assert within(rows, limits).tolist() == [True, False, True, False, True]
    assert within(rows, {}).all() and max_norms(statistics, None) == {}
    line = statistics_line("a", statistics["a"], TOKENIZER)
    assert line.startswith(
        "norms of a in the first item: median 2, largest 11.0 times that, of 't41'"
    )


def test_what_was_left_out_is_told() -> None:
    line = dropped_line(Counter({3: 7, 4: 2}), 991, 10.0, TOKENIZER)
    assert line.startswith("9 of 1,000 rows have more than 10 times the median norm")
    assert line.endswith("'t3' (7), 't4' (2)")


def test_a_multiple_that_would_drop_ordinary_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.max_norm_multiple=1\.0: expected more than 1"):
        DataConfig(path="x", max_norm_multiple=1.0).validate()
