"""Export formats: how a trained SAE is written for another library, and how it is loaded there.

To add a format, subclass `ExportFormat` and register an instance in `EXPORT_FORMATS`. The export
stage writes all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import ExportError
from foundation.registry import Registry

if TYPE_CHECKING:
    from analysis.origin import Source
    from sae_core.checkpoint.stored_sae import StoredSAE


class ExportFormat(ABC):
    """File format of another library, registered under the name of its folder in the export."""

    title: str
    """Human-readable name of the library, with its version if that matters, e.g. "SAELens 6"."""
    architectures: tuple[str, ...] = ("topk",)
    """Architectures that the format can hold, named as in `sae.architecture`."""

    @abstractmethod
    def write(self, sae: StoredSAE, source: Source, folder: Path) -> None:
        """Write the files.

        Matrices must be copied in ranges of latents (`sae.blocks`) and never read as a whole,
        because an SAE may be larger than memory. All values are in raw activation units.

        Args:
            sae: The SAE, which `check` has accepted.
            source: Names of the model, the text and the hookpoint.
            folder: Empty folder to write to.
        """

    @abstractmethod
    def how_to_load(self, source: Source, folder: str) -> str:
        """Return Python code for the model card that loads the SAE as `sae`.

        Args:
            source: Names of the model, the text and the hookpoint.
            folder: The folder that `write` wrote, such as "export/saelens".
        """

    def check(self, sae: StoredSAE) -> None:
        """Check that the format can hold the SAE.

        Raises:
            ExportError: If it cannot; the error gives the reason.
        """
        if sae.config.architecture not in self.architectures:
            raise ExportError(
                f"the {self.title} format does not support sae.architecture="
                f"{sae.config.architecture!r}; expected one of: {', '.join(self.architectures)}"
            )


EXPORT_FORMATS: Registry[ExportFormat] = Registry(
    kind="export format",
    key="export.formats",
    group="export_formats",
    builtin={
        "saelens": "analysis.export.saelens:SAELENS",
        "sparsify": "analysis.export.sparsify:SPARSIFY",
        "dictionary_learning": "analysis.export.dictionary_learning:DICTIONARY_LEARNING",
    },
)


def formats_for(sae: StoredSAE) -> tuple[dict[str, ExportFormat], list[ExportError]]:
    """Return the formats that can hold the SAE, by name, and the errors of those that cannot."""
    usable: dict[str, ExportFormat] = {}
    refusals: list[ExportError] = []
    for name, export_format in EXPORT_FORMATS.items():
        try:
            export_format.check(sae)
        except ExportError as refusal:
            refusals.append(refusal)
        else:
            usable[name] = export_format
    return usable, refusals
