"""The report stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from analysis.origin import with_stored_provenance

if TYPE_CHECKING:
    from conf.schema.run import RunConfig
from analysis.pages.run_page import render


def run(config: RunConfig, run_dir: Path) -> None:
    """Write `report/index.html`: a single file without scripts or external resources.

    Sections whose stage has not run say so, and name the command to run.

    Raises:
        RunFileError: If a JSON file of the run exists but cannot be read.
    """
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    temporary = page.with_name(".index.html.tmp")
    temporary.write_text(render(with_stored_provenance(config), run_dir), encoding="utf-8")
    temporary.replace(page)
    print(f"report: {page}")
