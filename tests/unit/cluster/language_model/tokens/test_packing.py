"""Test how documents fill contexts, and which rows are stored, by the settings of `data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.language_model.tokens.contexts import Contexts
from foundation.errors import ConfigError
from tests.support.tiny_models import contexts_of

TEXT = "w0 w1 w2\n\nw3\n\nw4 w5 w6 w7 w8 w9"  # ids 3 4 5, 6, 7 8 9 10 11 12; BOS 0, EOS 1


def prepare(tmp_path: Path, **settings: Any) -> Contexts:
    return contexts_of(tmp_path, TEXT, **{"context_tokens": 6} | settings)


def test_separate_documents_have_contexts_of_their_own(tmp_path: Path) -> None:
    contexts = prepare(tmp_path, packing="separate")
    every = np.arange(len(contexts.train))
    inputs = contexts.train.model_inputs(every)
    # The third document continues in a second context, which begins with BOS as well.
    assert inputs.input_ids[:, 0].tolist() == [0, 0, 0, 0]
    assert inputs.attention_mask is not None and inputs.position_ids is None
    shown = [
        ids[mask == 1].tolist()
        for ids, mask in zip(inputs.input_ids, inputs.attention_mask, strict=True)
    ]
    assert shown == [[0, 3, 4, 5], [0, 6], [0, 7, 8, 9, 10, 11], [0, 12]]
    assert contexts.train.kept(every).sum(1).tolist() == [3, 1, 5, 1]
    assert contexts.train.position[3].tolist() == [5, -1, -1, -1, -1]
    predicted = contexts.train.predicted(every)
    assert predicted is not None and predicted.sum(1).tolist() == [2, 0, 4, 0]
    assert contexts.counts["tokens"]["train"] == 10 and contexts.counts["no_token"] == 10


def test_masked_documents_begin_with_bos_and_position_0(tmp_path: Path) -> None:
    contexts = prepare(tmp_path, packing="masked", context_tokens=9)
    every = np.arange(len(contexts.train))
    inputs = contexts.train.model_inputs(every)
    assert inputs.attention_mask is None and inputs.position_ids is not None
    # The stream is 0 3 4 5 1, 0 6 1, 0 7 8 9 10 11 12 1: two contexts of 8.
    assert inputs.input_ids.tolist() == [
        [0, 0, 3, 4, 5, 1, 0, 6, 1],
        [0, 0, 7, 8, 9, 10, 11, 12, 1],
    ]
    assert inputs.position_ids.tolist() == [
        [0, 0, 1, 2, 3, 4, 0, 1, 2],
        [0, 0, 1, 2, 3, 4, 5, 6, 7],
    ]
    kept = contexts.train.kept(every)
    assert contexts.train.token_id[kept].tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    with_special = prepare(tmp_path, packing="masked", context_tokens=9, drop_special_tokens=False)
    kept = with_special.train.kept(every)  # a BOS inside a context is an attention sink, too
    assert with_special.train.token_id[kept].tolist() == [3, 4, 5, 1, 6, 1, *range(7, 13), 1]
    predicted = contexts.train.predicted(every)
    assert predicted is not None
    targets = inputs.input_ids[:, 2:][predicted].tolist()
    assert targets == [4, 5, 1, 1, *range(8, 13), 1]  # not the first tokens, which BOS predicts


def test_a_document_that_goes_on_in_the_next_context_keeps_its_place(tmp_path: Path) -> None:
    contexts = prepare(tmp_path, packing="masked", context_tokens=5)
    inputs = contexts.train.model_inputs(np.arange(len(contexts.train)))
    # 0 3 4 5 | 1 0 6 1 | 0 7 8 9 | 10 11 12 1
    assert inputs.position_ids is not None
    assert inputs.position_ids.tolist() == [
        [0, 0, 1, 2, 3],
        [0, 1, 0, 1, 2],
        [0, 0, 1, 2, 3],
        [0, 1, 2, 3, 4],
    ]
    assert contexts.train.position[3].tolist() == [3, 4, 5, 6]


def test_positions_and_tokens_are_left_out(tmp_path: Path) -> None:
    contexts = prepare(
        tmp_path,
        first_position=2,
        last_position=4,
        exclude_tokens=["w4"],
        exclude_ids=[4],
        context_tokens=7,
    )
    every = np.arange(len(contexts.train))
    # 0 | 3 4 5 1 6 1 and 0 | 7 8 9 10 11 12, of which the positions 2 to 4 are stored.
    assert contexts.train.token_id[contexts.train.kept(every)].tolist() == [5, 8, 9, 10]
    assert contexts.train.predicted(every) is None


def test_wrong_settings_of_rows_are_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"packing": "tight"}, r"data\.packing='tight'.*joined, masked, separate"),
        ({"kind": "images"}, r"data\.kind='images'.*text, token_ids, chat"),
        ({"roles": ["assistant"]}, r"data\.roles.*unless data\.kind=chat"),
        ({"first_position": 0}, r"data\.first_position=0: expected 1 to 5"),
        ({"first_position": 6}, r"data\.first_position=6: expected 1 to 5"),
        ({"last_position": 6}, r"data\.last_position=6: .*data\.first_position=1 to 5"),
        ({"first_position": 3, "last_position": 2}, r"data\.last_position=2"),
        ({"exclude_ids": [-1]}, r"data\.exclude_ids"),
        ({"exclude_tokens": ["w1 w2"]}, r"'w1 w2': expected one token.*found \['w1', 'w2'\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(tmp_path, **settings)
