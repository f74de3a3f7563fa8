"""Test the norms of rows by position and by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from cluster.harvest.norm_profile import NormGroup, as_json, norm_profiles

TOKENIZER: Any = SimpleNamespace(decode=lambda ids: f"t{ids[0]}")


def test_norms_are_grouped_by_position_and_token() -> None:
    norms = np.array([50, 1, 2, 4, 3, 8, 6, 20], np.float32)
    rows = {"a": np.outer(norms, [0.6, 0.8]).astype(np.float32)}
    sidecars = {
        "position": np.array([0, 1, 2, 3, 3, 4, 7, 9], np.int32),
        "token_id": np.array([5, 6, 6, 6, 7, 7, 8, 8], np.int32),
    }
    profile = norm_profiles(rows, sidecars)["a"]
    rounded = [group._replace(median=round(group.median, 5)) for group in profile.by_position]
    assert [group._replace(largest=round(group.largest, 5)) for group in rounded] == [
        NormGroup(0, 0, 1, 50, 50),
        NormGroup(1, 1, 1, 1, 1),
        NormGroup(2, 3, 3, 3, 4),
        NormGroup(4, 7, 2, 7, 8),
        NormGroup(8, 15, 1, 20, 20),
    ]
    tokens = as_json({"a": profile}, TOKENIZER)["a"]["by_token"]
    assert [(one["token"], one["rows"], round(one["largest"], 5)) for one in tokens] == [
        ("t5", 1, 50),
        ("t8", 2, 20),
        ("t7", 2, 8),
        ("t6", 3, 4),
    ]
    assert round(tokens[1]["median"], 5) == 13


def test_only_the_loudest_tokens_are_listed() -> None:
    rows = {"a": np.arange(1, 31, dtype=np.float32)[:, None]}
    sidecars = {"position": np.zeros(30, np.int32), "token_id": np.arange(30, dtype=np.int32)}
    profile = norm_profiles(rows, sidecars)["a"]
    assert [group.first for group in profile.by_token] == list(range(29, 21, -1))
