"""The export stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema.run import RunConfig


def run(config: RunConfig, run_dir: Path) -> None:
    """Export the newest valid checkpoint to `export/`, replacing any earlier export as a whole.

    Raises:
        CheckpointError: If the run has no valid checkpoint.
        ExportError: If the hookpoint is not usable as a folder name.
    """
    from analysis.export.card import model_card
    from analysis.export.dictionary_learning import write_dictionary_learning
    from analysis.export.saelens import write_saelens
    from analysis.export.sparsify import write_sparsify
    from analysis.origin import source_of, with_stored_provenance
    from cluster.run_folder.contents import read_optional_json
    from cluster.run_folder.files import EVALUATION, EXPORT
    from foundation.atomic_files import replaced_folder
    from sae_core.checkpoint.stored_sae import open_sae

    sae = open_sae(run_dir, verify_hashes=config.checkpoint.verify_hashes)
    config = with_stored_provenance(config)
    source = source_of(config, sae)
    metrics = read_optional_json(run_dir / EVALUATION)
    with replaced_folder(run_dir / EXPORT) as folder:
        sae.save(folder)
        write_saelens(sae, source, folder / "saelens")
        write_sparsify(sae, source, folder / "sparsify")
        write_dictionary_learning(sae, source, folder / "dictionary_learning")
        (folder / "README.md").write_text(
            model_card(sae, source, config, metrics), encoding="utf-8"
        )
    formats = "sae_core, saelens, sparsify, dictionary_learning"
    print(f"export: {run_dir / EXPORT} ({formats}), step {sae.step}")
