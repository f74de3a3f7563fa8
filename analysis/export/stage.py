"""The export stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema.run import RunConfig


def run(config: RunConfig, run_dir: Path) -> None:
    """Export the newest valid checkpoint to `export/`, replacing any earlier export as a whole.

    Formats that cannot hold this SAE are skipped, and the reason is printed for each.

    Raises:
        CheckpointError: If the run has no valid checkpoint.
        ExportError: If the hookpoint is not usable as a folder name.
    """
    from analysis.export.card import model_card
    from analysis.export.formats import formats_for
    from analysis.origin import source_of
    from cluster.run_folder.contents import read_optional_json
    from cluster.run_folder.files import EVALUATION, EXPORT
    from foundation.atomic_files import replaced_folder
    from sae_core.checkpoint.stored_sae import open_sae

    sae = open_sae(run_dir, verify_hashes=config.checkpoint.verify_hashes)
    source = source_of(config, run_dir, sae.config.hookpoint)
    metrics = read_optional_json(run_dir / EVALUATION)
    formats, refusals = formats_for(sae)
    for refusal in refusals:
        print(f"export: skipped: {refusal}")
    with replaced_folder(run_dir / EXPORT) as folder:
        sae.save(folder)
        for name, export_format in formats.items():
            (folder / name).mkdir()
            export_format.write(sae, source, folder / name)
        card = model_card(sae, source, config, metrics, formats)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"export: {run_dir / EXPORT} ({', '.join(['sae_core', *formats])}), step {sae.step}")
