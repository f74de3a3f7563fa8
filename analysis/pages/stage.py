"""The report stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from analysis.pages.run_page import render
from cluster.run_folder.files import REPORT
from foundation.atomic_files import naming

if TYPE_CHECKING:
    from conf.schema.run import RunConfig


def run(config: RunConfig, run_dir: Path) -> None:
    """Write `report/index.html`: a single file without scripts or external resources.

    Sections whose stage has not run say so, and name the command to run.

    Raises:
        RunFileError: If a JSON file of the run exists but cannot be read.
    """
    page = run_dir / REPORT
    page.parent.mkdir(parents=True, exist_ok=True)
    temporary = page.with_name(f".{page.name}.tmp")
    html = render(config, run_dir)
    with naming(page):
        temporary.write_text(html, encoding="utf-8")
    temporary.replace(page)
    print(f"report: {page}")
