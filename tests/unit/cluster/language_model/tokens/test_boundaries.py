"""Test which tokens begin contexts and separate documents, and special tokens inside documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cluster.harvest.text_report import token_lines
from cluster.language_model.errors import TextError
from cluster.language_model.tokens.boundaries import boundary_ids
from cluster.language_model.tokens.contexts import prepare_contexts
from conf.schema.data import DataConfig
from foundation.errors import ConfigError

NAMES = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
IDS = {name: 256 + i for i, name in enumerate(NAMES)}


def bytes_tokenizer(prepend: str | None = None, **declared: str) -> Any:
    """Make a tokenizer of single bytes with special tokens, as models of the Hub have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(NAMES)
    if prepend is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{prepend} $A", special_tokens=[(prepend, IDS[prepend])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **declared)


CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("tokenizer", "bos", "separator"),
    [
        # `<|endoftext|>` is in the vocabulary, but the model declares other tokens.
        (bytes_tokenizer(bos_token="<s>", eos_token="</s>"), "<s>", "</s>"),
        # What the tokenizer puts before a text counts more than its declarations.
        (bytes_tokenizer("<s>", eos_token="</s>"), "<s>", "</s>"),
        (bytes_tokenizer("<s>", bos_token="</s>", eos_token="</s>"), "<s>", "</s>"),
        # A chat model that was pre-trained with `<|endoftext|>`, such as SmolLM2-Instruct.
        (
            bytes_tokenizer(bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHAT),
            "<|endoftext|>",
            "<|endoftext|>",
        ),
        (bytes_tokenizer(eos_token="<|endoftext|>"), "<|endoftext|>", "<|endoftext|>"),
        (bytes_tokenizer(bos_token="<s>"), "<s>", "<s>"),
    ],
)
def test_contexts_begin_with_the_models_own_token(tokenizer: Any, bos: str, separator: str) -> None:
    assert boundary_ids(tokenizer, DataConfig()) == (IDS[bos], IDS[separator])


def test_settings_name_the_tokens() -> None:
    tokenizer = bytes_tokenizer(bos_token="<s>", eos_token="</s>")
    data = DataConfig(bos_token="<|endoftext|>", separator_token="<|im_end|>")
    assert boundary_ids(tokenizer, data) == (IDS["<|endoftext|>"], IDS["<|im_end|>"])
    with pytest.raises(ConfigError, match=r"data\.bos_token='<bos>'.*such as <s>, </s>"):
        boundary_ids(tokenizer, DataConfig(bos_token="<bos>"))
    with pytest.raises(TextError, match=r"neither a BOS nor an EOS token.*data\.bos_token"):
        boundary_ids(bytes_tokenizer(), DataConfig())
    assert boundary_ids(bytes_tokenizer(), DataConfig(bos_token="</s>")) == (IDS["</s>"],) * 2


def test_special_tokens_inside_a_document_are_text(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer(bos_token="<s>", eos_token="</s>")
    documents = [f"one <|endoftext|> two {i} <s>" for i in range(30)]
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(documents))
    data = DataConfig(path=str(file), context_tokens=8, heldout_fraction=0.2)
    contexts = prepare_contexts(data, tokenizer, tmp_path / "cache")
    ids = np.concatenate([contexts.train.token_id.ravel(), contexts.heldout.token_id.ravel()])
    assert set(ids[ids >= 256]) == {IDS["</s>"]}  # only the separators
    text = tokenizer.decode(contexts.train.token_id.ravel())
    assert text.startswith("one <|endoftext|> two ") and "<s>\n</s>one" in text
    assert contexts.counts["special_strings"] == 60
    first, written = token_lines(contexts, tokenizer)
    assert first.startswith(f"the first context begins with '<s>' ({IDS['<s>']}), 'o' (")
    assert written.startswith("60 special tokens are written in the documents")
