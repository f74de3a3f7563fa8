"""Measure the peak memory of encoding and decoding with an SAE under a limit.

python -m tests.support.sae_memory FOLDER LIMIT_MIB     # 0: the whole SAE in memory
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from pathlib import Path

import torch

from sae_core.checkpoint.stored_sae import open_sae
from sae_core.inference_memory import plan_shards
from sae_core.kernels import get_kernels
from sae_core.sharded_inference import ShardedSAE

ROWS = 3000


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


class Peak:
    """Context manager that samples the resident memory every millisecond."""

    def __enter__(self) -> Peak:
        self.before = self.highest = resident_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.highest = max(self.highest, resident_bytes())


def main(folder: Path, limit_mib: int) -> None:
    """Encode and decode in calls of at most `rows_at_once` rows, and print what was measured."""
    torch.set_num_threads(1)
    kernels = get_kernels("stock", torch.float32)
    stored = open_sae(folder)
    limit = limit_mib << 20 or 1 << 40
    plan = plan_shards(stored.config, stored.d_model, [torch.device("cpu")], limit)
    generator = torch.Generator().manual_seed(0)
    # Load the libraries behind the first matrix product before memory is measured.
    kernels.encode_topk(torch.ones(64, 64), torch.ones(4096, 64), torch.ones(4096), 4)
    selected = hashlib.sha256()
    with Peak() as peak:
        sae = ShardedSAE(stored, plan, kernels)
        for first in range(0, ROWS, plan.rows_at_once):
            n_rows = min(plan.rows_at_once, ROWS - first)
            x = torch.randn(n_rows, sae.d_model, generator=generator)
            values, indices = sae.encode_topk(x)
            selected.update(indices.sort(1).values.numpy().data)
            sae.decode_topk(values, indices)
    measured = {"shards": sae.n_shards, "peak_bytes": peak.highest - peak.before}
    print(json.dumps({**measured, "checksum": selected.hexdigest()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
