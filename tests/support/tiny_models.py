"""Tiny random language models with their own tokenizer, texts for them, and their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from activation_store import StoreWriter
from cluster.harvest import stage as harvest_stage
from cluster.harvest.worker import HarvestWorker, WorkerSpec
from cluster.language_model.tokens.contexts import Contexts, prepare_contexts
from conf.schema.data import DataConfig
from conf.schema.run import RunConfig

WORDS = [f"w{i}" for i in range(60)]
VOCABULARY = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}


def save_tokenizer(folder: Path) -> Any:
    """Save a word-level tokenizer: `w0` is 3, `w1` is 4, ...; BOS 0, EOS 1, unknown 2."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_llama(folder: Path, kv_heads: int = 1) -> LlamaForCausalLM:
    """Save a Llama with three layers of width 16, hookpoints `model.layers.0` to `.2`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_gpt2(folder: Path) -> GPT2LMHeadModel:
    """Save a GPT-2 with two blocks of width 12, hookpoints `transformer.h.0` and `.1`."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=12,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def opt() -> OPTForCausalLM:
    """Return an OPT with two layers of width 16, whose MLP runs on [contexts * tokens, width]."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
    )
    return OPTForCausalLM(config).eval()


def mixtral(experts_per_token: int) -> MixtralForCausalLM:
    """Return a Mixtral with two layers of width 16 and four experts."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=experts_per_token,
    )
    return MixtralForCausalLM(config).eval()


def write_text(file: Path, documents: int = 80) -> Path:
    """Write a text file of documents of 5 to 44 known words, separated by blank lines."""
    generator = torch.Generator().manual_seed(2)
    blocks = []
    for number in range(documents):
        picks = torch.randint(0, len(WORDS), (5 + number % 40,), generator=generator)
        blocks.append(" ".join(WORDS[pick] for pick in picks.tolist()))
    file.write_text("\n\n".join(blocks))
    return file


def contexts_of(tmp_path: Path, text: str | Path, template: str = "", **data: Any) -> Contexts:
    """Return the contexts of a text. Almost nothing is held out, unless `data` says so.

    Args:
        tmp_path: Folder for the text, the tokenizer and the cache.
        text: Documents separated by blank lines, or a file.
        template: Chat template of the tokenizer.
        data: Settings of `data`.
    """
    if isinstance(text, str):
        file = tmp_path / "text.txt"
        file.write_text(text)
        text = file
    config = DataConfig(path=str(text), **{"heldout_fraction": 1e-9, **data})
    config.validate()
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    if template:
        tokenizer.chat_template = template
    return prepare_contexts(config, tokenizer, tmp_path / "cache")


def harvest_here(config: RunConfig, run_dir: Path) -> None:
    """Harvest into `config.store.path` with a worker in this process, without Ray."""
    job = harvest_stage.prepare(config, run_dir)
    assert job is not None
    spec = WorkerSpec(
        config.model, config.data, config.seed, job.store, Path(config.cache_dir), "cpu", run_dir
    )
    run_dir.mkdir()
    worker = HarvestWorker(spec)
    calibration = worker.calibrate(0, job.plan.contexts(0)).calibration
    widths = {name: len(moments.mean) for name, moments in calibration.items()}
    writer = StoreWriter(
        job.store,
        widths,
        dtype=config.store.dtype,
        shard_tokens=config.store.shard_tokens,
        n_items=job.plan.n_items,
        provenance=job.provenance,
        calibration=calibration,
    )
    for item in range(job.plan.n_items):
        worker.run_item(item, job.plan.contexts(item))
    writer.finalise()
