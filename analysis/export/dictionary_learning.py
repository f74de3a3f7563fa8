"""Export for dictionary_learning: `ae.pt` and `config.json`.

`AutoEncoderTopK.from_pretrained(ae.pt)` loads the folder. The library requires `ae.pt` to be a
pickle of tensors. Writing it does not unpickle any untrusted data.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from analysis.export.formats import ExportFormat
from foundation.atomic_files import write_json
from sae_core.architectures.topk.settings import topk_settings
from sae_core.checkpoint.safetensors_file import BLOCK_BYTES, Entry, write_at, write_columns_at

if TYPE_CHECKING:
    from analysis.origin import Source
    from sae_core.checkpoint.stored_sae import StoredSAE


class DictionaryLearning(ExportFormat):
    """dictionary_learning's AutoEncoderTopK."""

    title = "dictionary_learning"

    def write(self, sae: StoredSAE, source: Source, folder: Path) -> None:
        """Write `ae.pt` and `config.json`.

        torch first writes `ae.pt` from fake tensors, which use no memory. The values are then
        copied into the file in blocks. The decoder in the file has shape [D, L], the transpose of
        our W_dec.
        """
        path = folder / "ae.pt"
        entries = _create_layout(path, sae)
        fd = os.open(path, os.O_WRONLY)
        try:
            _write_values(fd, entries, sae)
        finally:
            os.close(fd)
        _rewrite_checksums(path)
        write_json(folder / "config.json", dictionary_learning_config(sae, source))

    def how_to_load(self, source: Source, folder: str) -> str:
        """Return the code that loads `ae.pt`."""
        return (
            "from dictionary_learning.trainers.top_k import AutoEncoderTopK\n"
            f'sae = AutoEncoderTopK.from_pretrained("{folder}/ae.pt")'
        )


DICTIONARY_LEARNING = DictionaryLearning()


def _write_values(fd: int, entries: dict[str, Entry], sae: StoredSAE) -> None:
    for name, value in (
        ("b_dec", sae.b_dec),
        ("k", torch.tensor(topk_settings(sae.config).k, dtype=torch.int32)),
        # -1 marks the threshold as unset. By default, the library keeps the k largest latents.
        ("threshold", torch.tensor(-1.0)),
    ):
        write_at(fd, value, entries[name].offset_bytes)
    for ours, theirs in (("W_enc", "encoder.weight"), ("b_enc", "encoder.bias")):
        entry = entries[theirs]
        for first, rows in sae.blocks(ours):
            write_at(fd, rows, entry.offset_bytes + first * entry.row_bytes)
    for first, rows in sae.blocks("W_dec"):
        write_columns_at(fd, entries["decoder.weight"], first, rows)


def _create_layout(path: Path, sae: StoredSAE) -> dict[str, Entry]:
    """Create the file with its full size and return the dtype, shape and offset of each tensor."""
    n_latents, width = sae.config.n_latents, sae.d_model
    with FakeTensorMode():
        empty = {
            "b_dec": torch.empty(width),
            "k": torch.empty((), dtype=torch.int32),
            "threshold": torch.empty(()),
            "decoder.weight": torch.empty(width, n_latents),
            "encoder.weight": torch.empty(n_latents, width),
            "encoder.bias": torch.empty(n_latents),
        }
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(empty, path)
    # Loading into fake tensors reads no values, but records the offset of each storage in the file.
    with FakeTensorMode():
        laid: dict[str, Any] = torch.load(path, weights_only=True)
    return {
        name: Entry(tensor.dtype, tuple(tensor.shape), tensor.untyped_storage()._checkpoint_offset)
        for name, tensor in laid.items()
    }


def _rewrite_checksums(path: Path) -> None:
    """Replace the CRC-32 checksums in the archive, which were computed before the data was written.

    torch ignores them, but any other zip reader would report the file as damaged.
    """
    with zipfile.ZipFile(path) as archive, open(path, "r+b") as file:
        # The numbers below are offsets of the zip format. A local header has 30 bytes before its
        # name and extra field. A central directory entry has 46 before its name, extra field and
        # comment.
        entry = archive.start_dir
        for part in archive.infolist():
            file.seek(part.header_offset + 26)
            begin = part.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            crc = struct.pack("<I", _crc32(file, begin, part.file_size))
            # The checksum appears twice: in the descriptor after the data, behind its 4-byte
            # signature, and in the central directory.
            for place in (begin + part.file_size + 4, entry + 16):
                file.seek(place)
                file.write(crc)
            file.seek(entry + 28)
            entry += 46 + sum(struct.unpack("<HHH", file.read(6)))
        file.flush()
        os.fsync(file.fileno())


def _crc32(file: IO[bytes], begin: int, n_bytes: int) -> int:
    file.seek(begin)
    crc = 0
    while data := file.read(min(n_bytes, BLOCK_BYTES)):
        crc = zlib.crc32(data, crc)
        n_bytes -= len(data)
    return crc


def dictionary_learning_config(sae: StoredSAE, source: Source) -> dict[str, Any]:
    """Return the content of `config.json`: the keys that the loader and people read."""
    return {
        "trainer": {
            "dict_class": "AutoEncoderTopK",
            "activation_dim": sae.d_model,
            "dict_size": sae.config.n_latents,
            "k": topk_settings(sae.config).k,
            "lm_name": source.model,
            "submodule_name": source.hookpoint,
            "steps": sae.step,
        },
        "buffer": {"d_submodule": sae.d_model, "ctx_len": source.context_tokens},
    }
