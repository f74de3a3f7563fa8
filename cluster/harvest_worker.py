"""One harvest worker: runs the language model over work items and commits them to the store.

An item is a pure function of (text, tokenizer, model, data, seed, item number), so Ray may restart
the worker and run an item again at any moment: the second attempt gives the same bytes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cluster.config import DataConfig, ModelConfig
from cluster.errors import NonFiniteRowsError

if TYPE_CHECKING:
    from torch import Tensor

    from activation_store import Calibration, StoreWriter
    from cluster.contexts import Split


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to start, and to start again after it was killed."""

    model: ModelConfig
    data: DataConfig
    seed: int
    store_path: str
    cache_dir: Path
    device: str
    """cpu or cuda."""
    starts_dir: Path
    """Folder where each start leaves a file: how the driver sees that workers keep dying."""


class HarvestWorker:
    """A Ray actor; holds nothing that a restart could not rebuild from its WorkerSpec."""

    def __init__(self, spec: WorkerSpec) -> None:
        # Before torch is imported: threads that spin while they wait slow the other workers down.
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.spec = spec
        self._computed: tuple[int, dict[str, NDArray[Any]], dict[str, NDArray[Any]]] | None = None
        start = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        (spec.starts_dir / start).touch()

    def ready(self) -> None:
        """Returns as soon as Ray has placed the worker; nothing heavy is loaded by then."""

    def warm_up(self) -> None:
        """Loads what items need, so that an impossible model or text is told before any item."""
        _ = self._forward, self._split

    def calibrate(self, item: int, contexts: NDArray[np.int64]) -> dict[str, Calibration]:
        """Mean, standard deviation and norm of every hookpoint over the rows of one item.

        The norm is the mean Euclidean distance of a row from the mean row.
        """
        from activation_store import Calibration

        rows, sidecars = self._compute(item, contexts)
        self._computed = (item, rows, sidecars)  # the next thing asked for is this very item
        return {
            name: Calibration(*_moments(values.astype(np.float64))) for name, values in rows.items()
        }

    def run_item(self, item: int, contexts: NDArray[np.int64]) -> int:
        """Computes the rows of an item, commits them, and returns how many there are.

        Raises:
            NonFiniteRowsError: Some are not finite; the item is not committed.
        """
        if self._computed and self._computed[0] == item:
            rows, sidecars = self._computed[1:]
        else:
            rows, sidecars = self._compute(item, contexts)
        self._computed = None
        require_finite(item, rows, sidecars)
        self._writer.write_item(item, rows, sidecars)
        return len(sidecars["token_id"])

    def _compute(
        self, item: int, contexts: NDArray[np.int64]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        parts = list(self._batches(contexts))
        names = self.spec.model.hookpoints
        rows = {name: np.concatenate([part[name] for part in parts]) for name in names}
        kept = self._split.kept(contexts)
        sidecars = {
            column: getattr(self._split, column)[contexts][kept]
            for column in ("token_id", "document", "position")
        }
        # Pools are permuted before they are written: a chunk then mixes the item's documents.
        order = np.random.default_rng([self.spec.seed, 1, item]).permutation(kept.sum())
        return (
            {name: values[order] for name, values in rows.items()},
            {name: values[order] for name, values in sidecars.items()},
        )

    def _batches(self, contexts: NDArray[np.int64]) -> Iterator[dict[str, NDArray[Any]]]:
        import torch

        for start in range(0, len(contexts), self.spec.model.batch_contexts):
            batch = contexts[start : start + self.spec.model.batch_contexts]
            kept = torch.from_numpy(self._split.kept(batch)).to(self.spec.device)
            outputs = self._forward(self._split.input_ids(batch))
            yield {name: to_numpy(hidden[:, 1:][kept]) for name, hidden in outputs.items()}

    @cached_property
    def _forward(self) -> Callable[[NDArray[np.int64]], dict[str, Tensor]]:
        """Input ids [contexts, context_tokens] to the hookpoints' outputs; loads the model."""
        import torch

        from cluster.model_shards import ModelShards
        from cluster.models import capture, load_language_model

        model, device = self.spec.model, self.spec.device
        if device == "cpu":
            torch.set_num_threads(1)
        if model.shards > 1:
            return ModelShards(model, self.spec.cache_dir, device).capture
        whole = load_language_model(model, self.spec.cache_dir, device)
        return lambda ids: capture(whole, model.hookpoints, torch.from_numpy(ids).to(device))

    @cached_property
    def _split(self) -> Split:
        from cluster.contexts import prepare_contexts
        from cluster.models import load_tokenizer

        tokenizer = load_tokenizer(self.spec.model, self.spec.cache_dir)
        return prepare_contexts(self.spec.data, tokenizer, self.spec.cache_dir).train

    @cached_property
    def _writer(self) -> StoreWriter:
        from activation_store import StoreWriter

        return StoreWriter(self.spec.store_path)


def to_numpy(rows: Tensor) -> NDArray[Any]:
    """[n, D] on the CPU: bfloat16 stays bfloat16 (ml_dtypes), everything else becomes float32."""
    import ml_dtypes
    import torch

    if rows.dtype != torch.bfloat16:
        return rows.float().cpu().numpy()
    return rows.contiguous().view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)


def require_finite(
    item: int, rows: dict[str, NDArray[Any]], sidecars: dict[str, NDArray[Any]]
) -> None:
    """Raises: NonFiniteRowsError: naming the item, the array and the first such row's origin.

    Here and not where they are read: a trainer beside the harvest would already have met them.
    """
    for name, values in rows.items():
        bad = ~np.isfinite(values)
        if bad.any():
            row = int(bad.any(axis=1).argmax())
            document, position = (int(sidecars[key][row]) for key in ("document", "position"))
            raise NonFiniteRowsError(
                f"item {item}: {name} holds {int(bad.sum())} numbers that are not finite in "
                f"{int(bad.any(axis=1).sum())} rows, the first at document {document}, position "
                f"{position}: expected finite activations; the item is not stored; float16 "
                "overflows in many models: try model.dtype=bfloat16 or float32 in a new store"
            )


def _moments(rows: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any], float]:
    mean = rows.mean(axis=0)
    norm = float(np.linalg.norm(rows - mean, axis=1).mean())
    return mean, rows.std(axis=0), norm
