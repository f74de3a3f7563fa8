"""Documents that are ids or chats: read from the files that people have, and made into tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from cluster.language_model.errors import TextError
from cluster.language_model.texts import Tally, find_text
from cluster.language_model.tokens.encoders import ChatEncoder
from conf.schema.data import DataConfig
from tests.support.tiny_models import contexts_of, save_tokenizer

IDS = [[3, 4, 5], [], None, [6, 7]]
CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]
TEMPLATE = (
    "{% for message in messages %} <s> {{ message['role'] }} {{ message['content'] | trim }} </s>"
    "{% endfor %}{% if add_generation_prompt %} <s> assistant{% endif %}"
)
"""Like those of chat models, but with spaces, at which the tokenizer of these tests splits."""


def write(folder: Path, suffix: str, field: str, values: list[Any]) -> Path:
    file = folder / f"documents{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({field: values, "n": range(len(values))}), file)
    elif suffix == ".json":
        file.write_text(json.dumps([{field: value} for value in values]))
    else:
        lines = "".join(json.dumps({field: value}) + "\n" for value in values)
        with gzip.open(file, "wt") if suffix == ".jsonl.gz" else file.open("w") as stream:
            stream.write(lines)
    return file


SUFFIXES = [".jsonl", ".jsonl.gz", ".json", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ids_are_read_from_every_format_with_fields(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path, suffix, "input_ids", IDS)
    tally = Tally()
    text = find_text(DataConfig(path=str(file), kind="token_ids"))
    text.check()
    found = list(text.documents(tally))
    assert [one.tolist() for one in found if not isinstance(one, str)] == [[3, 4, 5], [6, 7]]
    assert (tally.null, tally.blank) == (1, 1)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_chats_are_read_from_every_format_with_fields(tmp_path: Path, suffix: str) -> None:
    sharegpt = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    for field, chat, expected in (
        ("messages", CHAT, CHAT),
        (
            "conversations",
            sharegpt,
            [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}],
        ),
    ):
        file = write(tmp_path, suffix, field, [chat, None])
        text = find_text(DataConfig(path=str(file), kind="chat", text_field=field))
        (found,) = text.documents()
        assert json.loads(str(found)) == expected


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("token_ids", "w1 w2", r"line 1: expected a list of token ids.*found str w1 w2"),
        ("token_ids", [3, -1], r"line 1: expected a list of token ids of 0 or more"),
        ("token_ids", [3, 2**31], "expected a list of token ids"),
        ("token_ids", [1.5], "expected a list of token ids"),
        ("token_ids", [[3], [4]], "expected a list of token ids"),
        ("chat", "w1", r"line 1: expected a list of messages.*found str w1"),
        ("chat", [{"text": "w1"}], r"'role' and 'content'.*found dict"),
        ("chat", [{"role": "user", "content": None}], r"'role' and 'content'"),
    ],
)
def test_other_values_are_named(tmp_path: Path, kind: str, value: Any, message: str) -> None:
    file = write(tmp_path, ".jsonl", "x", [value])
    with pytest.raises(TextError, match=message):
        find_text(DataConfig(path=str(file), kind=kind, text_field="x")).check()


def test_columns_and_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, ".parquet", "x", ["text"])
    with pytest.raises(TextError, match="has the type string; expected lists of integers"):
        find_text(DataConfig(path=str(file), kind="token_ids", text_field="x")).check()
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(TextError, match=r"plain\.txt: expected a file with the field 'messages'"):
        find_text(DataConfig(path=str(tmp_path / "plain.txt"), kind="chat")).check()


def test_ids_that_have_their_boundaries_get_no_others(tmp_path: Path) -> None:
    file = write(tmp_path, ".jsonl", "input_ids", [[0, 3, 4, 1], [0, 5, 1]])
    joined = contexts_of(tmp_path, file, kind="token_ids", context_tokens=8)
    assert joined.train.token_id.tolist() == [[0, 3, 4, 1, 0, 5, 1]]
    assert joined.train.kept(np.array([0])).tolist() == [[0, 1, 1, 0, 0, 1, 0]]
    options: dict[str, Any] = {"kind": "token_ids", "packing": "separate", "context_tokens": 4}
    separate = contexts_of(tmp_path, file, **options)
    assert separate.train.input_ids(np.arange(2)).tolist() == [[0, 3, 4, 1], [0, 5, 1, 1]]
    assert separate.train.kept(np.arange(2)).tolist() == [[1, 1, 0], [1, 0, 0]]


def test_the_turns_of_a_role_are_stored(tmp_path: Path) -> None:
    file = write(tmp_path, ".jsonl", "messages", [CHAT])
    # <s> user w1 w2 </s> <s> assistant w3 </s> <s> user w4 </s> <s> assistant w5 w6 </s>; the names
    # of roles are unknown words (2), w1 is 4.
    ids = [0, 2, 4, 5, 1, 0, 2, 6, 1, 0, 2, 7, 1, 0, 2, 8, 9, 1]
    for roles, stored in (
        ([], [2, 4, 5, 2, 6, 2, 7, 2, 8, 9]),
        (["assistant"], [6, 8, 9]),
        (["user"], [4, 5, 7]),
    ):
        contexts = contexts_of(
            tmp_path, file, TEMPLATE, kind="chat", roles=roles, context_tokens=len(ids) + 1
        )
        assert contexts.train.token_id.tolist() == [ids]
        kept = contexts.train.kept(np.array([0]))
        assert contexts.train.token_id[kept].tolist() == stored


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        # Something stands only before the last message, as reasoning does in some templates.
        ("{% if loop.last %}w50 {% endif %}{{ m['content'] }}", [6, 8, 9]),
        # The content of one message occurs in another one, and in the template.
        ("w3 w4 {{ m['content'] | trim }} w3", [6, 8, 9]),
        ("{{ m['role'] }} {{ m['content'] }} </s>", [6, 8, 9]),
        ("{{ m['content'] }}</s>w1", [6, 8, 9]),
    ],
)
def test_messages_are_found_in_any_template(tmp_path: Path, template: str, ids: list[int]) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = f"{{% for m in messages %}} {template}{{% endfor %}}"
    chat = [*CHAT[:2], {"role": "user", "content": " w3 w5 w6 "}, CHAT[3]]
    (found,) = ChatEncoder(tokenizer, ["assistant"]).encode([json.dumps(chat)])
    assert found.counts is not None
    assert [one for one in found.ids[found.counts].tolist() if one > 1] == ids


@pytest.mark.parametrize(
    "template",
    ["{{ m['content'] | upper }}", "{{ m['content'] }} {{ m['content'] }}", "{{ m['role'] }}"],
)
def test_a_template_that_changes_messages_is_refused(tmp_path: Path, template: str) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = f"{{% for m in messages %}} {template}{{% endfor %}}"
    with pytest.raises(TextError, match=r"changes the message 'w.*set data\.roles=\[\]"):
        ChatEncoder(tokenizer, ["assistant"]).encode([json.dumps(CHAT)])
    ChatEncoder(tokenizer).encode([json.dumps(CHAT)])


def test_templates_and_their_refusals_are_named(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(TextError, match=r"data\.kind=chat: .*has no chat template"):
        ChatEncoder(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('only alternate roles') }}"
    with pytest.raises(TextError, match=r"refuses messages of the roles .*only alternate roles"):
        ChatEncoder(tokenizer).encode([json.dumps(CHAT)])


def test_special_tokens_in_messages_are_counted(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    encoder = ChatEncoder(tokenizer)
    encoder.encode([json.dumps([{"role": "user", "content": "w1 </s> w2 <s>"}])])
    assert encoder.n_special == 2
