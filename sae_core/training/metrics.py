"""Training metrics, summed on the device and reduced over the ranks from time to time."""

from __future__ import annotations

import resource
import sys

import torch
import torch.distributed as dist

from sae_core.architectures import StepOutput
from sae_core.engine.deepspeed_engine import SAEEngine

_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Peak dense bfloat16 FLOP/s on tensor cores, from NVIDIA's data sheets."""


class StepMetrics:
    """Metrics of one SAE, summed over the steps since the last `reduce`.

    Args:
        engine: engine of the SAE.
    """

    def __init__(self, engine: SAEEngine) -> None:
        self.engine = engine
        self.d_model = engine.sae.b_dec.shape[0]
        self._reset()

    def _reset(self) -> None:
        device = self.engine.device
        self.n_steps = 0
        self.n_rows = 0
        # Squared error, loss, auxiliary loss, active pairs, sum of squared inputs, inputs' sum [D].
        self._sums = torch.zeros(5 + self.d_model, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, raw: torch.Tensor, out: StepOutput) -> None:
        """Add one step, without a host sync.

        Args:
            raw: [B, D] raw rows of this replica.
            out: output of the step.
        """
        x = self.engine.sae.normalise(raw)
        scalars = torch.stack(
            [
                out.squared_error.double(),
                out.loss.detach().double(),
                out.aux_loss.double(),
                out.n_active.double(),
                x.square().sum().double(),
            ]
        )
        self._sums += torch.cat((scalars, x.sum(0).double()))
        self.n_steps += 1
        self.n_rows += raw.shape[0]

    def reduce(self) -> dict[str, float]:
        """Return means over all ranks since the last call, and reset the sums.

        A collective call over all ranks; the host waits for the device.
        """
        sae = self.engine.sae
        mesh = sae.mesh
        dead = sae.dead().sum().double().reshape(1)
        packed = torch.cat((self._sums, dead))
        dist.all_reduce(packed)
        packed = packed.cpu()
        # All but the active pairs and dead latents are the same on every rank of a latent group, so
        # their sums over all ranks are divided by the size of the group.
        error, loss, aux, active, square, *sums = (packed[:-1]).tolist()
        rows = self.n_rows * mesh.n_data
        mean = torch.tensor(sums, dtype=torch.float64) / mesh.n_latent / rows
        variance = square / mesh.n_latent - rows * float(mean.square().sum())
        steps = max(self.n_steps, 1) * dist.get_world_size()
        row = {
            "loss": loss / steps,
            "fvu": error / mesh.n_latent / variance if variance > 0 else float("nan"),
            "auxk_loss": aux / steps,
            "l0": active / rows,
            "dead_fraction": float(packed[-1]) / mesh.n_data / sae.config.n_latents,
            "grad_norm": float(self.engine.grad_norm),
            "lr": self.engine.lr,
        }
        self._reset()
        return row


def mfu(tokens_per_s: float, d_model: int, n_latents: int, n_ranks: int) -> float | None:
    """Return the model FLOP utilisation, or None if the device's peak is unknown.

    Only the encoder's dense product is counted, 2 L D FLOP per token, because a sparse step needs
    no other. The convention for dense autograd, 12 L D, would count work that is never done.
    """
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((flops for key, flops in _PEAK_FLOPS.items() if key in name), None)
    return None if peak is None else tokens_per_s * 2 * n_latents * d_model / (peak * n_ranks)


def peak_memory_bytes() -> int:
    """Return the peak memory of this rank: device memory on CUDA, resident memory on the CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # macOS reports ru_maxrss in bytes, Linux in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
