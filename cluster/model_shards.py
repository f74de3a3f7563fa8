"""A language model split over several processes of one harvest worker, which is rank 0 of them.

The split is the tensor parallelism that transformers plans for the architecture: every process
holds a slice of each large matrix, and what a block hands on is whole on all of them.

The other ranks are child processes, not Ray actors of their own: Ray can meet one request for
several GPUs on one node only, and the group lives and dies as the one actor that the pool knows.
The death of any member ends all of them, and the actor that Ray starts anew begins with a whole
group.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cluster.config import ModelConfig
from cluster.errors import ModelError
from cluster.models import capture, load_language_model, model_config, prepared_folder
from sae_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import Store  # type: ignore[attr-defined]

_TIMEOUT_S = 600
"""For one collective; a member that is frozen for longer ends its group."""
_POLL_S = 0.2
_LAST_WORDS_S = 5.0
"""For rank 0 to say itself what went wrong, once a member is gone."""
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def require_shardable(cfg: ModelConfig, cache_dir: Path) -> None:
    """Refuses what transformers cannot split evenly; reads no weights.

    Raises:
        ConfigError: the architecture has no plan, or its heads or widths do not divide.
        ModelError: no such model.
    """
    if cfg.shards == 1:
        return
    config = model_config(cfg, cache_dir).get_text_config()
    if not getattr(config, "base_model_tp_plan", None):
        raise ConfigError(
            "model.shards",
            cfg.shards,
            f"1: transformers has no tensor-parallel plan for {config.model_type}",
            "more cluster.harvest_workers hold more whole copies",
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size % cfg.shards:
            raise ConfigError("model.shards", cfg.shards, f"a divisor of the model's {name}={size}")


class ModelShards:
    """Rank 0 of the group: starts the others, and runs the model with them.

    Args:
        cfg: of the model; `cfg.shards` processes, one GPU each where there are any.
        cache_dir: as for `load_language_model`.
        device: cpu or cuda.

    Raises:
        ModelError: The model cannot be loaded.
    """

    def __init__(self, cfg: ModelConfig, cache_dir: Path, device: str) -> None:
        import torch.distributed as dist

        self._hookpoints, self._device, self._checked = cfg.hookpoints, device, False
        # What is converted once is converted before anybody looks for it.
        prepared_folder(cfg, cache_dir)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, cfg.shards, is_master=True, wait_for_workers=False
        )
        self._members = [
            self._start(rank, store.port, cfg, cache_dir) for rank in range(1, cfg.shards)
        ]
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            self._model = _load(0, store, cfg, cache_dir, device)
        except RuntimeError as error:
            self._leave_if_broken(error)
            raise

    def capture(self, input_ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """As `cluster.models.capture`, with the hookpoints of the config.

        Args:
            input_ids: [contexts, context_tokens].

        Raises:
            ModelError: also where a hookpoint's output is split over the processes.
        """
        header = np.array(input_ids.shape, dtype=np.int64).tobytes()
        try:
            for member in self._members:
                assert member.stdin is not None
                member.stdin.write(header + input_ids.tobytes())
                member.stdin.flush()
            outputs = _capture(self._model, self._hookpoints, input_ids, self._device)
            if not self._checked:
                _require_whole(outputs)
                self._checked = True
        except (RuntimeError, BrokenPipeError) as error:
            self._leave_if_broken(error)
            raise
        return outputs

    def _start(
        self, rank: int, port: int, cfg: ModelConfig, cache_dir: Path
    ) -> subprocess.Popen[bytes]:
        member = {
            "rank": rank,
            "port": port,
            "model": asdict(cfg),
            "cache_dir": str(cache_dir),
            "device": self._device,
            "parent": os.getpid(),
        }
        path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.model_shards", json.dumps(member)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        )

    def _member_is_gone(self) -> bool:
        return any(member.poll() is not None for member in self._members)

    def _watch(self) -> None:
        """Ends the group once a member is gone: a collective without it may wait for ever."""
        while not self._member_is_gone():
            time.sleep(_POLL_S)
        time.sleep(_LAST_WORDS_S)
        self._leave("a process of the group died")

    def _leave_if_broken(self, error: Exception) -> None:
        """Ray is to start the worker anew where it was the group that failed, not the model."""
        import torch.distributed as dist

        deadline = time.monotonic() + 1.0
        while not self._member_is_gone() and time.monotonic() < deadline:
            time.sleep(_POLL_S / 10)
        if self._member_is_gone() or isinstance(error, dist.DistError) or "gloo" in str(error):
            self._leave(str(error))

    def _leave(self, reason: str) -> NoReturn:
        print(f"model.shards: {reason}; the worker starts anew", file=sys.stderr, flush=True)
        for member in self._members:
            with contextlib.suppress(ProcessLookupError):
                member.kill()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def _load(rank: int, store: Store, cfg: ModelConfig, cache_dir: Path, device: str) -> nn.Module:
    import torch
    import torch.distributed as dist

    if device == "cpu":
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        torch.cuda.set_device(rank)
    os.environ["LOCAL_RANK"] = str(rank)  # how transformers chooses the GPU
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=store,
        rank=rank,
        world_size=cfg.shards,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    return load_language_model(cfg, cache_dir, device, shards=cfg.shards)


def _capture(
    model: nn.Module, hookpoints: Sequence[str], input_ids: NDArray[np.int64], device: str
) -> dict[str, Tensor]:
    import torch

    return capture(model, hookpoints, torch.from_numpy(input_ids).to(device))


def _require_whole(outputs: dict[str, Tensor]) -> None:
    """Raises: ModelError: on all ranks alike, where they hold different parts of an output."""
    import torch
    import torch.distributed as dist

    for name, hidden in outputs.items():
        first = hidden.float().clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, 0)
        error = (first - hidden.float()).norm() / first.norm().clamp_min(1e-30)
        worst = error.reshape(1).nan_to_num(0.0)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if torch.any(worst > 0.01):
            raise ModelError(
                f"model.hookpoints: with model.shards each process holds a part of {name!r}; "
                "expected outputs that are whole, as those of blocks, of attention and of MLPs; "
                "name such a module, or set model.shards=1"
            )


def _follow(member: dict[str, Any]) -> None:
    """The life of a member: loads its part, then goes along with every pass of rank 0."""
    import torch.distributed as dist

    # Not left behind with a GPU's memory when rank 0 is killed, even while frozen itself.
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != member["parent"]:
        return
    cfg, device = ModelConfig(**member["model"]), member["device"]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", member["port"], cfg.shards, is_master=False
    )
    model = _load(member["rank"], store, cfg, Path(member["cache_dir"]), device)
    checked = False
    while header := sys.stdin.buffer.read(16):
        contexts, tokens = np.frombuffer(header, dtype=np.int64)
        data = sys.stdin.buffer.read(int(contexts * tokens) * 8)
        input_ids = np.frombuffer(data, dtype=np.int64).reshape(contexts, tokens).copy()
        outputs = _capture(model, cfg.hookpoints, input_ids, device)
        if not checked:
            _require_whole(outputs)
            checked = True


if __name__ == "__main__":
    _follow(json.loads(sys.argv[1]))
