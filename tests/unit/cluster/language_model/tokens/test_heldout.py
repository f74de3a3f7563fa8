"""Test what is held out, and that too little text is reported before the harvest."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.harvest import stage as harvest_stage
from cluster.harvest.provenance import describe, differences
from cluster.language_model.errors import TextError
from cluster.language_model.loading import load_tokenizer
from cluster.language_model.tokens.contexts import Contexts
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.run import RunConfig
from tests.support.tiny_models import contexts_of, save_llama, write_text

LONG = " ".join(f"w{i % 60}" for i in range(1000))


def prepared(tmp_path: Path, text: str, **settings: Any) -> Contexts:
    return contexts_of(tmp_path, text, **{"context_tokens": 8, "heldout_fraction": 0.2} | settings)


def test_the_last_tokens_of_each_document_are_held_out(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(20)]
    text = f"{' '.join(words)}\n\n{' '.join(words[:10])}"
    contexts = prepared(tmp_path, text, heldout="tokens", context_tokens=2)
    assert contexts.train.token_id.ravel().tolist() == [*range(3, 19), 1, *range(3, 11), 1]
    assert contexts.heldout.token_id.ravel().tolist() == [*range(19, 23), 1, 11, 12, 1]
    assert contexts.heldout.position.ravel().tolist() == [16, 17, 18, 19, 20, 8, 9, 10]
    assert contexts.heldout.document.ravel().tolist() == [0] * 5 + [1] * 3
    assert contexts.n_documents == 2


def test_nothing_is_held_out_when_asked(tmp_path: Path) -> None:
    contexts = prepared(tmp_path, "\n\n".join(["w1 w2 w3"] * 50), heldout="none")
    assert not len(contexts.heldout) and len(contexts.train) == 50 * 4 // 7


def test_each_rule_has_its_own_cache(tmp_path: Path) -> None:
    folders = {prepared(tmp_path, LONG, heldout=h).folder for h in ("documents", "tokens", "none")}
    assert len(folders) == 3


def config_of(tmp_path: Path, text: str | None, **data: Any) -> RunConfig:
    save_llama(tmp_path / "model")
    file = tmp_path / "text.txt"
    if text is None:
        write_text(file)
    else:
        file.write_text(text)
    settings = {"tokens": 200, "context_tokens": 16, **data}
    return RunConfig(
        cache_dir=str(tmp_path / "cache"),
        model=ModelConfig(path=str(tmp_path / "model"), hookpoints=["model.layers.1"]),
        data=DataConfig(path=str(file), **settings),
    )


def prepare(config: RunConfig, tmp_path: Path) -> str:
    printed = io.StringIO()
    harvest_stage.prepare(config, tmp_path / "run", Console(file=printed, width=200))
    return printed.getvalue()


@pytest.mark.parametrize("fraction", [0.05, 0.999])
def test_a_text_of_one_document_is_refused_before_the_harvest(
    tmp_path: Path, fraction: float
) -> None:
    config = config_of(tmp_path, LONG, heldout_fraction=fraction)
    with pytest.raises(TextError, match=r"(0|1) documents? with .*data\.heldout=tokens") as refused:
        prepare(config, tmp_path)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("heldout", ["tokens", "none"])
def test_either_choice_lets_one_document_be_harvested(tmp_path: Path, heldout: str) -> None:
    printed = prepare(config_of(tmp_path, LONG, heldout=heldout), tmp_path)
    assert "text: 1 file, " in printed and "text.txt" in printed
    held = {"tokens": "1 held out (51 tokens)", "none": "0 held out (0 tokens)"}[heldout]
    assert "text: 1 document: 1 for training" in printed and held in printed


def test_the_files_and_counts_are_printed(tmp_path: Path) -> None:
    config = config_of(tmp_path, None)
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [
        f'{{"text": "{block}"}}' for block in (tmp_path / "text.txt").read_text().split("\n\n")
    ]
    (folder / "a.jsonl").write_text("\n".join([*lines, '{"text": null}', '{"text": " "}']))
    (folder / "README.md").write_text("a card")
    config.data = replace(config.data, path=str(folder))
    printed = prepare(config, tmp_path)
    assert "a.jsonl" in printed and "skipped, descriptions of the data: README.md" in printed
    assert "text: 80 documents: " in printed
    assert "skipped 1 null and 1 blank ones" in printed
    assert "held out for the evaluation, fewer than eval.tokens=" in printed
    config.eval.tokens = 16
    assert "fewer than eval.tokens" not in prepare(config, tmp_path)


@pytest.mark.parametrize("where", ["harvest", "plan"])
def test_a_text_that_cannot_be_read_is_told_before_the_model_is_looked_at(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.planning import stage as plan_stage

    config = config_of(tmp_path, None)
    config.model.path = str(tmp_path / "no model")
    config.stage = "pipeline"
    (tmp_path / "a.jsonl").write_text('{"txt": "a"}')
    for path, message in {"nowhere": "not found", "a.jsonl": r"\['txt'\]"}.items():
        config.data = replace(config.data, path=str(tmp_path / path))
        stage = {"harvest": harvest_stage, "plan": plan_stage}[where]
        with pytest.raises(TextError, match=message):
            stage.run(config, tmp_path / "run")


def test_a_store_says_what_was_held_out_and_earlier_ones_held_out_documents(tmp_path: Path) -> None:
    config = config_of(tmp_path, None)
    cache = Path(config.cache_dir)
    wanted = describe(config, load_tokenizer(config.model, cache), cache)
    assert wanted["heldout"] == "documents"
    earlier = {key: value for key, value in wanted.items() if key != "heldout"}
    assert differences(earlier, wanted) == []
    assert differences(earlier, {**wanted, "heldout": "tokens"}) == [
        "heldout: the store has 'documents', this run has 'tokens'"
    ]


def test_the_two_parts_of_a_document_share_no_token(tmp_path: Path) -> None:
    contexts = prepared(tmp_path, LONG, heldout="tokens", context_tokens=2)
    places = [
        set(part.position[part.token_id > 2].ravel()) for part in (contexts.train, contexts.heldout)
    ]
    assert not places[0] & places[1] and places[0] | places[1] == set(np.arange(1000))
