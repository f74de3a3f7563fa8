"""Read the same rows with other packages, shuffled as their users shuffle them.

zarr-python and tensorstore read our own store, checksums included. The buffers of OpenMOSS'
Language-Model-SAEs and of dictionary_learning are reimplemented here in the packages' styles. The
original OpenMOSS buffer is refilled from safetensors files, and the original dictionary_learning
buffer from a language model. OpenMOSS copies its whole buffer for every batch; the version here
does not.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness.peers import HOW_TO_MAKE, peers_available, run_in_peers
from benchmarks.store.data import ARRAY, BASELINE, BATCH_ROWS, Data

Calls = dict[tuple[str, str], Callable[[], object]]
Reader = Callable[[int, int], NDArray[Any]]
"""Returns the rows [start, stop) of the data."""


def peer_calls(data: Data) -> Calls:
    """Return calls of other packages that each read all rows once."""
    zarr, tensorstore = f"zarr-python {version('zarr')}", f"tensorstore {version('tensorstore')}"
    safetensors = f"safetensors {version('safetensors')}"
    shard, chunk = data.shard_rows, data.store().header.chunk_rows
    by_zarr, by_tensorstore = _zarr_reader(data), _tensorstore_reader(data)
    return {
        (zarr, "sequential"): lambda: _sequential(data, by_zarr, shard),
        (zarr, "shuffled, gathered"): lambda: _shuffled(data, by_zarr, chunk),
        (tensorstore, "sequential"): lambda: _sequential(data, by_tensorstore, shard),
        (tensorstore, "shuffled, gathered"): lambda: _shuffled(data, by_tensorstore, chunk),
        (safetensors, "sequential, no checksums"): lambda: _safetensors(data, shuffled=False),
        # No peer shuffles like this, because rows of different shards are never mixed. The time is
        # a lower bound: the cost of reading and gathering once.
        (safetensors, "shuffled in shards, no checksums"): lambda: _safetensors(
            data, shuffled=True
        ),
        ("shuffle buffer (OpenMOSS style)", "shuffled, no checksums"): (
            lambda: _shuffle_buffer(data)
        ),
        ("mask buffer (dictionary_learning style)", "half shuffled, no checksums"): (
            lambda: _mask_buffer(data)
        ),
    }


def _zarr_reader(data: Data) -> Reader:
    import zarr

    array: Any = zarr.open_group(data.folder / BASELINE, mode="r")[ARRAY]
    return lambda start, stop: array[start:stop]


def _tensorstore_reader(data: Data) -> Reader:
    import tensorstore

    path = str(data.folder / BASELINE / ARRAY)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    array = tensorstore.open(spec).result()
    return lambda start, stop: array[start:stop].read().result()


def _sequential(data: Data, read: Reader, step: int) -> None:
    for start in range(0, data.n_rows, step):
        read(start, start + step)


def _shuffled(data: Data, read: Reader, chunk_rows: int) -> None:
    """Shuffle like our stream, but with another reader: random chunks, then rows in a buffer."""
    rng = np.random.default_rng()
    starts = rng.permutation(np.arange(0, data.n_rows, chunk_rows))
    buffer = np.empty((data.buffer_rows, data.d_model), data.item.dtype)
    per_buffer = data.buffer_rows // chunk_rows
    for first in range(0, len(starts), per_buffer):
        part = starts[first : first + per_buffer].tolist()
        for number, start in enumerate(part):
            buffer[number * chunk_rows : (number + 1) * chunk_rows] = read(
                start, start + chunk_rows
            )
        order = rng.permutation(len(part) * chunk_rows)
        for row in range(0, len(order), BATCH_ROWS):
            np.take(buffer, order[row : row + BATCH_ROWS], axis=0)


def _safetensors(data: Data, shuffled: bool) -> None:
    """Read shard by shard; if `shuffled`, in random order with the rows of each shard permuted."""
    from safetensors.torch import load_file

    order = torch.randperm(data.n_items) if shuffled else torch.arange(data.n_items)
    for item in order.tolist():
        rows = load_file(data.shard(item))[ARRAY]
        picks = torch.randperm(len(rows)) if shuffled else None
        for row in range(0, len(rows), BATCH_ROWS):
            batch = slice(row, row + BATCH_ROWS)
            rows[batch].clone() if picks is None else rows[picks[batch]]


def _shuffle_buffer(data: Data) -> None:
    """Fill a buffer from whole shards, permute all its rows, and use batches until half is left."""
    from safetensors.torch import load_file

    order = torch.randperm(data.n_items).tolist()
    parts: list[torch.Tensor] = []
    for item in order:
        parts.append(load_file(data.shard(item))[ARRAY])
        if sum(map(len, parts)) < data.buffer_rows and item != order[-1]:
            continue
        rows = torch.cat(parts)
        rows = rows[torch.randperm(len(rows))]
        left = 0 if item == order[-1] else data.buffer_rows // 2
        while len(rows) > left:
            rows = rows[BATCH_ROWS:]  # a view of the rest; the original copies its buffer here
        parts = [rows]


def _mask_buffer(data: Data) -> None:
    """Read through a buffer with a mask of used rows, refilled in order once half are used."""
    rows = torch.from_numpy(np.memmap(data.raw, np.uint16, "c")).view(torch.bfloat16)
    rows = rows.view(data.n_rows, data.d_model)
    for _ in _mask_batches(rows, data.buffer_rows):
        pass


def _mask_batches(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    buffer, given, taken = rows[:0], torch.zeros(0, dtype=torch.bool), 0
    while taken < len(rows) or not given.all():
        if (~given).sum() < size // 2 and taken < len(rows):
            left = buffer[~given]
            count = min(size - len(left), len(rows) - taken)
            buffer = torch.cat([left, rows[taken : taken + count]])
            given, taken = torch.zeros(len(buffer), dtype=torch.bool), taken + count
        fresh = (~given).nonzero().squeeze(1)
        picks = fresh[torch.randperm(len(fresh))[:BATCH_ROWS]]
        given[picks] = True
        yield buffer[picks]


def saelens_rows(data: Data, timeout_s: float = 300.0) -> list[dict[str, Any]]:
    """Time reading SAELens' cached activations, in the peers' environment.

    Returns:
        The rows. If the peers' environment is missing, there are none and the reason is on stderr.

    Raises:
        PeerError: If the process fails or takes too long.
    """
    if not peers_available():
        print(
            f"SAELens skipped: .venv-peers is missing or incomplete; {HOW_TO_MAKE}", file=sys.stderr
        )
        return []
    with tempfile.TemporaryDirectory(dir=data.folder) as folder:
        arguments = ["benchmarks.store.saelens", str(data.raw), str(data.d_model)]
        rows: list[dict[str, Any]] = run_in_peers(
            "SAELens' cache", [*arguments, "--folder", folder], timeout_s
        )
    return rows
