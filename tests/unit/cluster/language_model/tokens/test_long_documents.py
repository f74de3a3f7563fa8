"""Test that a document tokenised in pieces has the tokens of the whole document."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cluster.language_model.tokens import long_documents
from cluster.language_model.tokens.long_documents import encode_documents
from tests.support.paths import ROOT
from tests.support.tiny_models import save_tokenizer

ALPHABET = "aabcdeeefghiijklmnoopqrsttuvwxyzäöüñßжд中文🙂"


def make_text(seed: int, words: int) -> str:
    """Return words of odd lengths with all kinds of white space and punctuation between them."""
    generator = random.Random(seed)
    parts = []
    for _ in range(words):
        parts.append("".join(generator.choices(ALPHABET, k=generator.randint(1, 9))))
        parts.append(
            generator.choice([" ", " ", " ", "  ", "\n", "\n\n", ", ", ". ", "-", "\t", "123"])
        )
    return "".join(parts)


def byte_level() -> tuple[Any, Any]:
    """GPT-2, Llama 3, Qwen."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return backend, trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False
    )


def whole_text_bpe() -> tuple[Any, Any]:
    """Llama 2 and Gemma: no pre-tokenizer, white space replaced, a mark before the text."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return backend, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>"], max_token_length=12, show_progress=False
    )


def unigram() -> tuple[Any, Any]:
    """T5, ALBERT and other models of SentencePiece."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend, trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


def word_piece() -> tuple[Any, Any]:
    """BERT."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend, trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]"], show_progress=False
    )


@pytest.fixture(scope="module", params=[byte_level, whole_text_bpe, unigram, word_piece])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    backend, trainer = request.param()
    backend.train_from_iterator(
        [make_text(1, 3000)[i : i + 300] for i in range(0, 9000, 300)], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=None)


@pytest.mark.parametrize(
    "text",
    [
        make_text(2, 4000),
        "a" * 20_000,  # one word, longer than any overlap
        make_text(3, 500) + " " * 9000 + make_text(4, 500),
        "🙂" * 5000,
        make_text(5, 300).replace(" ", "") * 7,
    ],
    ids=["words", "one word", "spaces", "four bytes each", "repetition"],
)
@pytest.mark.parametrize("piece", [700, 1009, 5000])
def test_pieces_give_the_tokens_of_the_whole(
    tokenizer: Any, text: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(long_documents, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(long_documents, "OVERLAP_CHARACTERS", 300)
    short = text[:300]
    pieces, alone = encode_documents(tokenizer, [text, short])
    assert [*pieces] == whole
    assert alone == tokenizer(short, add_special_tokens=False)["input_ids"]


def test_pieces_are_joined_without_reading_all_at_once(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    monkeypatch.setattr(long_documents, "PIECE_CHARACTERS", 2000)
    monkeypatch.setattr(long_documents, "OVERLAP_CHARACTERS", 600)

    class Watched:
        is_fast = True

        def __call__(self, text: str, **options: Any) -> Any:
            lengths.append(len(text))
            return tokenizer(text, **options)

    text = make_text(6, 5000)
    encode_documents(Watched(), [text])
    assert len(text) > 20_000 and max(lengths) <= 2600


MEASURE = """
import json, resource, sys
from pathlib import Path
from cluster.language_model.tokens.contexts import prepare_contexts
from conf.schema.data import DataConfig
from transformers import AutoTokenizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

file, tokenizer, cache = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
before = peak()
prepare_contexts(DataConfig(path=file, heldout="tokens"), tokenizer, Path(cache))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_document_of_50_megabytes_needs_a_bounded_memory(tmp_path: Path, name: str) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    text = "w1 w22 w3 w4 w55 w6 " * 2_500_000
    value = [{"text": text}] if name == "a.json" else {"text": text}
    (tmp_path / name).write_text(json.dumps(value))
    arguments = [tmp_path / name, tmp_path / "tokenizer", tmp_path / "cache"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 1.5e9  # 6.4e9 when the tokenizer of SmolLM2 gets all of it at once
