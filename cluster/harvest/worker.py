"""The harvest worker: run the language model over work items and commit them to the store.

An item is a pure function of (text, tokenizer, model, data, seed, item number). Ray may therefore
restart the worker and run an item again at any time: the second attempt gives the same bytes.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.errors import NonFiniteRowsError
from cluster.harvest.norm_profile import NormProfile, norm_profiles
from cluster.harvest.norms import NormStatistics, max_norms, norm_statistics, within
from cluster.openmp import waiting_variables
from conf.hookpoint import find_hookpoint
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from activation_store import Calibration, StoreWriter
    from cluster.language_model.tokens.contexts import ModelInputs, Split


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs to start, and to start again after it was killed."""

    model: ModelConfig
    data: DataConfig
    seed: int
    store_path: str
    cache_dir: Path
    device: str
    """Device of the model: cpu or cuda."""
    starts_dir: Path
    """Folder in which a worker creates a file each time it starts. The driver counts the files to
    detect workers that keep dying."""


class FirstItem(NamedTuple):
    """Statistics of each hookpoint's rows in the first work item."""

    calibration: dict[str, Calibration]
    """Mean, standard deviation and norm of the rows that are stored."""
    norms: dict[str, NormStatistics]
    profiles: dict[str, NormProfile]
    """Norms of all rows by position and token."""
    """Norms of all rows."""


class ItemResult(NamedTuple):
    """The rows of a work item that was committed."""

    rows: int
    """Number of rows stored."""
    dropped: Counter[int]
    """Number of rows left out because of their norm, for each token id."""


class HarvestWorker:
    """A Ray actor whose whole state can be rebuilt from its WorkerSpec after a restart."""

    def __init__(self, spec: WorkerSpec) -> None:
        # Set before torch is imported: threads that spin while waiting slow other workers down.
        os.environ.update(waiting_variables(alone=False))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.spec = spec
        self._computed: tuple[int, dict[str, NDArray[Any]], dict[str, NDArray[Any]]] | None = None
        start = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        (spec.starts_dir / start).touch()

    def ready(self) -> None:
        """Return as soon as Ray has placed the worker, before anything heavy is loaded."""

    def warm_up(self) -> None:
        """Load the model and the text, so that errors in either show up before the first item."""
        _ = self._forward, self._split

    def calibrate(self, item: int, contexts: NDArray[np.int64]) -> FirstItem:
        """Compute mean, standard deviation and norm of every hookpoint from the rows of one item.

        The norm is the mean Euclidean distance of a row from the mean row. Rows that
        `data.max_norm_multiple` leaves out do not count.

        Args:
            item: Number of the work item.
            contexts: [n] numbers of the contexts in the item.
        """
        from activation_store import Calibration

        rows, sidecars = self._compute(item, contexts)
        self._computed = (item, rows, sidecars)  # `run_item` is called for this item next
        require_finite(item, rows, sidecars)
        norms = norm_statistics(rows, sidecars)
        kept = within(rows, max_norms(norms, self.spec.data.max_norm_multiple))
        calibration = {
            name: Calibration(*_moments(values[kept].astype(np.float64)))
            for name, values in rows.items()
        }
        return FirstItem(calibration, norms, norm_profiles(rows, sidecars))

    def run_item(self, item: int, contexts: NDArray[np.int64]) -> ItemResult:
        """Compute the rows of an item and commit those that are not above the norm's limit.

        Args:
            item: Number of the work item.
            contexts: [n] numbers of the contexts in the item.

        Raises:
            NonFiniteRowsError: If some rows are not finite. The item is then not committed.
        """
        if self._computed and self._computed[0] == item:
            rows, sidecars = self._computed[1:]
        else:
            rows, sidecars = self._compute(item, contexts)
        self._computed = None
        require_finite(item, rows, sidecars)
        # Another run may have created the store and spelled the same hookpoints differently.
        arrays = self._writer.header.arrays
        named = {find_hookpoint(name, arrays) or name: values for name, values in rows.items()}
        # The limits are those of the first item, whichever worker computed it.
        kept = within(named, (self._writer.header.provenance or {}).get("max_norms", {}))
        dropped = Counter(sidecars["token_id"][~kept].tolist())
        if dropped:
            named = {name: values[kept] for name, values in named.items()}
            sidecars = {name: values[kept] for name, values in sidecars.items()}
        self._writer.write_item(item, named, sidecars)
        return ItemResult(int(kept.sum()), dropped)

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
        # Permute the item's rows so that every chunk mixes rows from many documents.
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
            outputs = self._forward(self._split.model_inputs(batch))
            yield {name: to_numpy(hidden[:, 1:][kept]) for name, hidden in outputs.items()}

    @cached_property
    def _forward(self) -> Callable[[ModelInputs], dict[str, Tensor]]:
        """Function from a model's inputs to the hookpoints' tensors [contexts, context_tokens, D].

        The first access loads the model.
        """
        import torch

        from cluster.language_model.hooks import capture, require_one_row_per_token
        from cluster.language_model.loading import load_language_model
        from cluster.language_model.packing import require_document_masks, to_device
        from cluster.language_model.tensor_parallel import ModelShards

        model, device = self.spec.model, self.spec.device
        if device == "cpu":
            torch.set_num_threads(1)
        if model.shards > 1:
            shards = ModelShards(model, self.spec.cache_dir, device)
            return lambda inputs: shards.capture(inputs.input_ids)
        whole = load_language_model(model, self.spec.cache_dir, device)
        require_one_row_per_token(whole, model.hookpoints)
        if self.spec.data.packing == "masked":
            require_document_masks(whole, model.hookpoints)
        return lambda inputs: capture(whole, model.hookpoints, **to_device(inputs, device))

    @cached_property
    def _split(self) -> Split:
        from cluster.language_model.loading import load_tokenizer
        from cluster.language_model.tokens.contexts import prepare_contexts

        tokenizer = load_tokenizer(self.spec.model, self.spec.cache_dir, self.spec.data.kind)
        return prepare_contexts(self.spec.data, tokenizer, self.spec.cache_dir).train

    @cached_property
    def _writer(self) -> StoreWriter:
        from activation_store import StoreWriter

        return StoreWriter(self.spec.store_path)


def to_numpy(rows: Tensor) -> NDArray[Any]:
    """Copy rows [n, D] to the CPU. bfloat16 is kept (ml_dtypes); other dtypes become float32."""
    import ml_dtypes
    import torch

    if rows.dtype != torch.bfloat16:
        return rows.float().cpu().numpy()
    return rows.contiguous().view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)


def require_finite(
    item: int, rows: dict[str, NDArray[Any]], sidecars: dict[str, NDArray[Any]]
) -> None:
    """Check that all values are finite before the item is committed.

    Checking later would be too late, because a concurrent trainer reads items as soon as they are
    committed.

    Args:
        item: Number of the work item, used in the error message.
        rows: [n, D] for each hookpoint.
        sidecars: [n] `document` and `position` of each row, used in the error message.

    Raises:
        NonFiniteRowsError: If a value is NaN or infinite. The error names the item, the array and
            the origin of the first such row.
    """
    for name, values in rows.items():
        bad = ~np.isfinite(values)
        if bad.any():
            row = int(bad.any(axis=1).argmax())
            document, position = (int(sidecars[key][row]) for key in ("document", "position"))
            raise NonFiniteRowsError(
                f"item {item}: {name} has {int(bad.sum())} values that are not finite in "
                f"{int(bad.any(axis=1).sum())} rows, the first at document {document}, position "
                f"{position}; expected finite activations. The item was not stored. If "
                "model.dtype=float16, which overflows in many models, use bfloat16 or float32 and "
                "a new store; otherwise check the model's weights"
            )


def _moments(rows: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Return mean [D], standard deviation [D] and mean distance from the mean for rows [n, D]."""
    mean = rows.mean(axis=0)
    norm = float(np.linalg.norm(rows - mean, axis=1).mean())
    return mean, rows.std(axis=0), norm
