"""Open the SAE for an evaluation: its devices, its kernels, and the memory that it may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foundation.errors import ConfigError
from foundation.host_memory import available_bytes

if TYPE_CHECKING:
    import torch

    from conf.schema.run import RunConfig
    from sae_core.checkpoint.stored_sae import StoredSAE
    from sae_core.sharded_inference import ShardedSAE

_GIB = 1 << 30
_SHARE = 0.5
"""Fraction of the free memory that the SAE and its rows take if `eval.max_memory_gib` is null. The
language model is loaded later and needs memory, too."""


def devices_of(config: RunConfig) -> tuple[torch.device, ...]:
    """Return the devices to evaluate on: the CPU, or as many GPUs as training has ranks.

    Raises:
        ConfigError: If `train.device` is cuda, but this machine has no CUDA device.
    """
    import torch

    wanted = config.train.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return (torch.device("cpu"),)
    if not torch.cuda.is_available():
        raise ConfigError(
            "train.device",
            wanted,
            "a machine with a CUDA device",
            "use train.device=cpu to evaluate on the CPU",
        )
    count = min(torch.cuda.device_count(), config.parallel.n_ranks)
    if count <= 1:
        return (torch.device("cuda"),)
    return tuple(torch.device("cuda", index) for index in range(count))


def compute_dtype_of(config: RunConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the encoder's product."""
    import torch

    name = config.eval.compute_dtype
    if name == "auto":
        # As in training, whose kernels may support no other dtype.
        name = config.train.compute_dtype
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def shard_sae(
    config: RunConfig, stored: StoredSAE, devices: tuple[torch.device, ...]
) -> ShardedSAE:
    """Load the SAE onto the devices, or prepare to read it in shards if it does not fit.

    On CUDA the kernels are those of training, and on the CPU the stock kernels.

    Raises:
        ConfigError: If the kernels are not available, or `eval.max_memory_gib` is too low.
        DamagedCheckpointError: If the weights cannot be read.
    """
    from sae_core.inference_memory import plan_shards
    from sae_core.kernels import get_kernels
    from sae_core.kernels.registry import default_kernels
    from sae_core.sharded_inference import ShardedSAE

    name = default_kernels(devices[0].type)
    if devices[0].type == "cuda" and config.train.kernels != "auto":
        name = config.train.kernels
    kernels = get_kernels(name, compute_dtype_of(config, devices[0]))
    itemsize = 4 if kernels.copy_dtype is None else kernels.copy_dtype.itemsize
    limit = _limit_bytes(config, devices)
    plan = plan_shards(stored.config, stored.d_model, devices, limit, itemsize)
    return ShardedSAE(stored, plan, kernels)


def _limit_bytes(config: RunConfig, devices: tuple[torch.device, ...]) -> int:
    if config.eval.max_memory_gib is not None:
        return int(config.eval.max_memory_gib * _GIB)
    host = available_bytes()
    if host is None:
        raise ConfigError(
            "eval.max_memory_gib",
            None,
            "a number of GiB, because this system does not report its free memory",
        )
    free = [host]
    if devices[0].type == "cuda":
        import torch

        free += [torch.cuda.mem_get_info(device)[0] for device in devices]
    return int(_SHARE * min(free))
