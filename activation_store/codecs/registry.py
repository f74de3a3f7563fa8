"""All codecs by name. This file must not import NumPy, because `--help` imports it.

To add a codec, implement the interface in `base.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foundation.registry import Registry

if TYPE_CHECKING:
    from activation_store.codecs.base import Codec

CODECS: Registry[Codec] = Registry(
    "codec",
    "store.codec",
    "codecs",
    {
        "none": "activation_store.codecs.raw:RAW",
        "blosc": "activation_store.codecs.blosc:BLOSC",
        "int8": "activation_store.codecs.int8:INT8",
    },
)
"""The codecs by name. The same names are used in `store.codec` and in the header of a store."""
