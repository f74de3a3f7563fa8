"""Texts: find the documents that the settings of `data` name, and read them in a fixed order.

| `data` | class |
|---|---|
| a file, a folder of files, a saved Hugging Face dataset | `FileText` |
| the name of a data set on the Hugging Face Hub | `HubText` |
| several of them with weights (`data.mixture`) | `Mixture` |
"""

from cluster.language_model.texts.base import Tally, Text
from cluster.language_model.texts.find import find_text, pin_revisions, require_text

__all__ = ["Tally", "Text", "find_text", "pin_revisions", "require_text"]
