"""A language model split over several processes. The harvest worker that starts them is rank 0.

The split follows the tensor-parallel plan that transformers has for the architecture: every process
holds a slice of each large matrix, and the output of a block is complete on every process.

The other ranks are child processes of the worker, not Ray actors. One actor can thus ask Ray for
all GPUs on one node. The group also fails as a whole: when any member dies, all members are killed,
and the actor that Ray then restarts begins with a complete group.
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

from cluster.language_model.errors import ModelError
from cluster.language_model.hooks import capture, require_one_row_per_token
from cluster.language_model.loading import load_language_model, model_config, prepared_folder
from cluster.run_folder.environment import ROOT
from conf.hookpoint import parse_hookpoint
from conf.schema.model import ModelConfig
from foundation.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch's stubs lack it

_TIMEOUT_S = 600
"""Time limit for one collective. If a member is frozen for longer, the group ends."""
_POLL_S = 0.2
_REPORT_TIMEOUT_S = 5.0
"""Time that rank 0 has for reporting the error itself after a member has died."""
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def require_shardable(cfg: ModelConfig, cache_dir: Path) -> None:
    """Check that transformers can split the model evenly, without reading its weights.

    Raises:
        ConfigError: If the architecture has no tensor-parallel plan, or `cfg.shards` does not
            divide its number of heads or its widths.
        ModelError: If the model does not exist.
    """
    if cfg.shards == 1:
        return
    config = model_config(cfg, cache_dir).get_text_config()
    if not getattr(config, "base_model_tp_plan", None):
        raise ConfigError(
            "model.shards",
            cfg.shards,
            f"1, because transformers has no tensor-parallel plan for {config.model_type}",
            "raise cluster.harvest_workers to run more whole copies of the model",
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size % cfg.shards:
            raise ConfigError(
                "model.shards",
                cfg.shards,
                f"a divisor of the model's {name}={size}",
                "use such a number, or 1",
            )


class ModelShards:
    """Rank 0 of the group, which starts the other ranks and runs the model together with them.

    Args:
        cfg: Configuration of the model. `cfg.shards` is the number of processes. On cuda each
            process uses one GPU.
        cache_dir: Folder that keeps converted models.
        device: cpu or cuda.

    Raises:
        ModelError: If the model cannot be loaded.
    """

    def __init__(self, cfg: ModelConfig, cache_dir: Path, device: str) -> None:
        import torch.distributed as dist

        self._hookpoints = cfg.hookpoints
        self._device = device
        self._checked = False
        # Convert a GGUF model now, so that the ranks do not wait for one another to convert it.
        prepared_folder(cfg, cache_dir)
        store = dist.TCPStore(  # type: ignore[attr-defined]  # torch's stubs lack it
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
        """Return the tensors of the config's hookpoints; see `hooks.capture`.

        Args:
            input_ids: [contexts, context_tokens] int64.

        Returns:
            For each hookpoint a tensor [contexts, context_tokens, D] in the model's dtype.

        Raises:
            ModelError: If a module does not exist, did not run, or has a tensor that has another
                shape or is split over the processes.
        """
        header = np.array(input_ids.shape, dtype=np.int64).tobytes()
        try:
            for member in self._members:
                assert member.stdin is not None
                member.stdin.write(header + input_ids.tobytes())
                member.stdin.flush()
            outputs = _capture(self._model, self._hookpoints, input_ids, self._device)
            if not self._checked:
                _require_complete(outputs)
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
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.language_model.tensor_parallel", json.dumps(member)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        )

    def _member_is_gone(self) -> bool:
        return any(member.poll() is not None for member in self._members)

    def _watch(self) -> None:
        """End the group once a member has died, because a collective might wait for it forever."""
        while not self._member_is_gone():
            time.sleep(_POLL_S)
        time.sleep(_REPORT_TIMEOUT_S)
        self._leave("a process of the group has died")

    def _leave_if_broken(self, error: Exception) -> None:
        """End this worker if the group failed, so that Ray restarts it.

        Do nothing if the error came from the model itself: a restart would only repeat it.
        """
        import torch.distributed as dist

        # A member may take a moment to die after the collective failed.
        deadline = time.monotonic() + 1.0
        while not self._member_is_gone() and time.monotonic() < deadline:
            time.sleep(_POLL_S / 10)
        if self._member_is_gone() or isinstance(error, dist.DistError) or "gloo" in str(error):
            self._leave(str(error))

    def _leave(self, reason: str) -> NoReturn:
        print(f"model.shards: {reason}; restarting the worker", file=sys.stderr, flush=True)
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
    model = load_language_model(cfg, cache_dir, device, shards=cfg.shards)
    require_one_row_per_token(model, cfg.hookpoints)
    return model


def _capture(
    model: nn.Module, hookpoints: Sequence[str], input_ids: NDArray[np.int64], device: str
) -> dict[str, Tensor]:
    import torch

    return capture(model, hookpoints, torch.from_numpy(input_ids).to(device))


def _require_complete(outputs: dict[str, Tensor]) -> None:
    """Check that every rank holds the complete tensor of each hookpoint.

    All ranks must call this function together. Either all ranks raise, or none does.

    Raises:
        ModelError: If the ranks hold different values of a tensor.
    """
    import torch
    import torch.distributed as dist

    # Compare with rank 0. The tolerance is 1%, because complete outputs may differ by rounding.
    for name, hidden in outputs.items():
        first = hidden.float().clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, 0)
        error = (first - hidden.float()).norm() / first.norm().clamp_min(1e-30)
        worst = error.reshape(1).nan_to_num(0.0)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if torch.any(worst > 0.01):
            raise ModelError(
                f"model.hookpoints: with model.shards > 1 each process has only a part of the "
                f"{parse_hookpoint(name).describe()}; expected a tensor that is complete in each "
                "process, such as the output of a block, attention or MLP; choose such a "
                "hookpoint, or set model.shards=1"
            )


def _follow(member: dict[str, Any]) -> None:
    """Run one of the other ranks: load its part of the model, then join every pass of rank 0.

    Rank 0 sends the input ids of each pass to this process's standard input, and closes that input
    to end the process.
    """
    import torch.distributed as dist

    # Have the kernel kill this process when rank 0 dies. Otherwise this process, if frozen, would
    # keep its GPU memory.
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != member["parent"]:  # rank 0 died before the call above
        return
    cfg, device = ModelConfig(**member["model"]), member["device"]
    store = dist.TCPStore(  # type: ignore[attr-defined]  # torch's stubs lack it
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
            _require_complete(outputs)
            checked = True


if __name__ == "__main__":
    _follow(json.loads(sys.argv[1]))
