"""Test how documents become contexts: packing, the split by document, the seeded order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.harvest.items import plan_items
from cluster.language_model.errors import TextError
from cluster.language_model.tokens.contexts import Contexts
from cluster.language_model.tokens.heldout import is_heldout
from tests.support.tiny_models import contexts_of, write_text


def prepare(tmp_path: Path, text: str | None = None, **settings: Any) -> Contexts:
    given = write_text(tmp_path / "text.txt") if text is None else text
    return contexts_of(tmp_path, given, **{"context_tokens": 8, "heldout_fraction": 0.3} | settings)


def test_documents_are_joined_by_the_separator_and_cut(tmp_path: Path) -> None:
    # Documents of 4 and 5 words, 11 tokens with separators: one context of 7, 4 left over.
    text = "w0 w1 w2 w3\n\nw4 w5 w6 w7 w8"
    contexts = prepare(tmp_path, text, heldout_fraction=1e-9)
    assert contexts.train.input_ids(np.array([0])).tolist() == [[0, 3, 4, 5, 6, 1, 7, 8]]
    assert contexts.train.document.tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert contexts.train.position.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert contexts.train.kept(np.array([0])).tolist() == [[1, 1, 1, 1, 0, 1, 1]]
    assert len(contexts.train) == 1 and len(contexts.heldout) == 0


def test_special_tokens_stay_when_asked(tmp_path: Path) -> None:
    contexts = prepare(tmp_path, drop_special_tokens=False)
    assert contexts.train.kept(np.arange(len(contexts.train))).all()


def test_no_document_is_in_both_splits_and_none_is_lost(tmp_path: Path) -> None:
    contexts = prepare(tmp_path, context_tokens=2)  # a context of one token loses no remainder
    train, heldout = (set(split.document.ravel()) for split in (contexts.train, contexts.heldout))
    assert train | heldout == set(range(contexts.n_documents)) and not train & heldout
    assert 10 < len(heldout) < 40  # 24 of 80 expected
    n_tokens = sum(5 + number % 40 + 1 for number in range(80))
    assert len(contexts.train) + len(contexts.heldout) == n_tokens


def test_the_split_depends_on_the_text_of_the_document_alone() -> None:
    texts = [f"document {i}" for i in range(4000)]
    at_5, at_20 = ({t for t in texts if is_heldout(t, f)} for f in (0.05, 0.2))
    assert at_5 < at_20
    assert 140 < len(at_5) < 260 and 700 < len(at_20) < 900


def test_the_cache_is_opened_again_and_follows_the_text(tmp_path: Path) -> None:
    first = prepare(tmp_path)
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    again = prepare(tmp_path)
    assert again.folder == first.folder
    assert (again.folder / "meta.json").stat().st_mtime_ns == stamp
    other = prepare(tmp_path, "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12")
    assert other.folder != first.folder
    assert not list((tmp_path / "cache" / "contexts").glob("*.tmp"))


def test_items_cover_each_context_once_in_seeded_order(tmp_path: Path) -> None:
    split = prepare(tmp_path).train
    plan = plan_items(split, seed=3, tokens=10**9, shard_tokens=40)
    assert plan.contexts_per_item == 5  # 35 of 40 rows
    items = np.concatenate([plan.contexts(i) for i in range(plan.n_items)])
    assert sorted(items) == list(range(len(split)))
    assert plan.n_rows == split.kept(items).sum()
    assert plan_items(split, 3, 10**9, 40).order.tolist() == plan.order.tolist()
    assert plan_items(split, 4, 10**9, 40).order.tolist() != plan.order.tolist()


@pytest.mark.parametrize("tokens", [1, 34, 35, 36, 200])
def test_a_plan_stops_at_the_first_context_that_reaches_the_tokens(
    tmp_path: Path, tokens: int
) -> None:
    split = prepare(tmp_path).train
    plan = plan_items(split, 0, tokens, 40)
    rows = split.kept(plan.order).sum(axis=1)
    assert plan.n_rows == rows.sum() >= tokens > rows[:-1].sum()
    assert plan.n_items == -(-len(plan.order) // 5)


def test_too_little_text_and_too_small_items_are_refused(tmp_path: Path) -> None:
    contexts = prepare(tmp_path, "w1 w2", heldout_fraction=1e-9)
    with pytest.raises(TextError, match="shorter than one context"):
        plan_items(contexts.train, 0, 10, 40)
    with pytest.raises(TextError, match=r"store.shard_tokens=6: expected at least 7, the"):
        plan_items(prepare(tmp_path).train, 0, 10, 6)
