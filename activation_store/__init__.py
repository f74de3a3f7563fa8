"""Store language model activations in a Zarr v3 group: write once, verify on read, read shuffled.

Example::

    writer = StoreWriter("store", arrays={"model.layers.9": 576}, dtype="bfloat16")
    writer.write_item(0, rows, {"token_id": ids, "document": documents, "position": positions})
    writer.finalise()
    stream = ShuffledStream(open_store("store"), ["model.layers.9"], seed=0, batch_rows=4096,
                            window_items=16, buffer_rows=65_536)
    batch = stream.next().arrays["model.layers.9"]  # [4096, 576]
    where = find_documents(open_store("store"), [17])  # rows of document 17, by position
    context = take_rows(open_store("store"), "model.layers.9", where.rows)

A path is a local folder or an address s3://bucket/prefix. For the latter, the endpoint and the
credentials are taken from the environment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from activation_store.format.zarr_registration import register_bfloat16

if TYPE_CHECKING:
    from activation_store.codecs.base import (
        ChunkCompressor,
        Codec,
        DiskArray,
        RowCodec,
        ScaleOffset,
    )
    from activation_store.codecs.registry import CODECS
    from activation_store.consumers.cursors import (
        Consumer,
        ConsumerState,
        lead_items,
        list_consumers,
        remove_consumer,
    )
    from activation_store.consumers.retention import delete_consumed
    from activation_store.errors import DeletedDataError
    from activation_store.format.calibration import Calibration
    from activation_store.format.header import StoreHeader
    from activation_store.format.item_record import ItemRecord, Statistics
    from activation_store.maintenance.repair import RepairReport, repair_store
    from activation_store.maintenance.shuffle_quality import ShuffleQuality, shuffle_quality
    from activation_store.maintenance.verify import Damage, verify_store
    from activation_store.reading.blocks import LoadedBlock, LoadedRows
    from activation_store.reading.lookup import DocumentRows, find_documents, find_rows, take_rows
    from activation_store.reading.mixture import MixtureStream, check_mixture
    from activation_store.reading.store import Store, open_store, store_exists
    from activation_store.reading.stream import (
        ShuffledStream,
        StagedBatch,
        StagedStream,
        StreamBatch,
    )
    from activation_store.writing.harvest_lock import HarvestLock
    from activation_store.writing.writer import StoreWriter

_HOMES = {
    "HarvestLock": "writing.harvest_lock",
    "Consumer": "consumers.cursors",
    "ConsumerState": "consumers.cursors",
    "list_consumers": "consumers.cursors",
    "lead_items": "consumers.cursors",
    "remove_consumer": "consumers.cursors",
    "DeletedDataError": "errors",
    "RepairReport": "maintenance.repair",
    "repair_store": "maintenance.repair",
    "delete_consumed": "consumers.retention",
    "CODECS": "codecs.registry",
    "ChunkCompressor": "codecs.base",
    "Codec": "codecs.base",
    "DiskArray": "codecs.base",
    "RowCodec": "codecs.base",
    "ScaleOffset": "codecs.base",
    "Calibration": "format.calibration",
    "StoreHeader": "format.header",
    "ItemRecord": "format.item_record",
    "LoadedBlock": "reading.blocks",
    "LoadedRows": "reading.blocks",
    "DocumentRows": "reading.lookup",
    "find_documents": "reading.lookup",
    "find_rows": "reading.lookup",
    "take_rows": "reading.lookup",
    "MixtureStream": "reading.mixture",
    "check_mixture": "reading.mixture",
    "ShuffleQuality": "maintenance.shuffle_quality",
    "shuffle_quality": "maintenance.shuffle_quality",
    "Statistics": "format.item_record",
    "Store": "reading.store",
    "open_store": "reading.store",
    "store_exists": "reading.store",
    "ShuffledStream": "reading.stream",
    "StagedBatch": "reading.stream",
    "StagedStream": "reading.stream",
    "StreamBatch": "reading.stream",
    "Damage": "maintenance.verify",
    "verify_store": "maintenance.verify",
    "StoreWriter": "writing.writer",
}

__all__ = [
    "CODECS",
    "Calibration",
    "ChunkCompressor",
    "Codec",
    "Consumer",
    "ConsumerState",
    "Damage",
    "DeletedDataError",
    "DiskArray",
    "DocumentRows",
    "HarvestLock",
    "ItemRecord",
    "LoadedBlock",
    "LoadedRows",
    "MixtureStream",
    "RepairReport",
    "RowCodec",
    "ScaleOffset",
    "ShuffleQuality",
    "ShuffledStream",
    "StagedBatch",
    "StagedStream",
    "Statistics",
    "Store",
    "StoreHeader",
    "StoreWriter",
    "StreamBatch",
    "check_mixture",
    "delete_consumed",
    "find_documents",
    "find_rows",
    "lead_items",
    "list_consumers",
    "open_store",
    "remove_consumer",
    "repair_store",
    "shuffle_quality",
    "store_exists",
    "take_rows",
    "verify_store",
]


def __getattr__(name: str) -> Any:
    # Import lazily: `--help` imports this package through the config schema. It must start fast and
    # does not need NumPy.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


register_bfloat16()
