"""A process group of a single rank, which the trainer's mesh and DeepSpeed require."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist


def start_one_rank(device_type: str = "cpu") -> None:
    """Initialise a process group with this process only; the caller must destroy the group.

    Args:
        device_type: "cpu" or "cuda".
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": device_type}
    os.environ.update(one_rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    nccl = device_type == "cuda" and dist.is_nccl_available()
    dist.init_process_group("nccl" if nccl else "gloo")
