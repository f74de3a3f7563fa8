"""Training metrics, summed on the device and reduced over the ranks when a row is logged."""

from __future__ import annotations

import resource
import sys

import torch
import torch.distributed as dist

from sae_core.architectures.base import StepOutput
from sae_core.architectures.registry import architecture_of
from sae_core.engine.deepspeed_engine import SAEEngine
from sae_core.training_metrics import Totals, with_own

_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Peak dense bfloat16 FLOP/s on tensor cores, from NVIDIA's data sheets."""


class StepMetrics:
    """Metrics of one SAE, summed over the steps since the last `reduce`.

    Args:
        engine: Engine of the SAE.
    """

    def __init__(self, engine: SAEEngine) -> None:
        self.engine = engine
        own = architecture_of(engine.sae.config).metrics
        self.own_names = [metric.name for metric in own]
        self.table = with_own(own)
        self.names = ("squared_error", "loss", *self.own_names, "n_active", "square")
        self._reset()

    def _reset(self) -> None:
        self.n_steps = 0
        self.n_rows = 0
        # Use one vector (`names`, then the inputs' sum [D]), so that a report needs one collective.
        size = len(self.names) + self.engine.sae.d_model
        self._sums = torch.zeros(size, dtype=torch.float64, device=self.engine.device)

    @torch.no_grad()
    def add(self, raw: torch.Tensor, out: StepOutput) -> None:
        """Add one step, without a host sync.

        Args:
            raw: [B, D] raw rows of this replica.
            out: Output of the step.

        Raises:
            ValueError: If the architecture's own metrics are not those that it has registered.
        """
        if sorted(out.metrics) != sorted(self.own_names):
            raise ValueError(
                f"{type(self.engine.sae).__name__}: StepOutput.metrics has {sorted(out.metrics)}, "
                f"expected the names in Architecture.metrics, {sorted(self.own_names)}"
            )
        scalars = {
            "squared_error": out.squared_error,
            "loss": out.loss.detach(),
            **out.metrics,
            "n_active": out.n_active,
            "square": out.input_square,
        }
        named = torch.stack([scalars[name].double() for name in self.names])
        self._sums += torch.cat((named, out.input_total.double()))
        self.n_steps += 1
        self.n_rows += raw.shape[0]

    def reduce(self) -> dict[str, float]:
        """Return the metrics over all ranks since the last call, and reset the sums.

        A collective call over all ranks; the host waits for the device.
        """
        sae = self.engine.sae
        mesh = sae.mesh
        dead = sae.dead().sum().double().reshape(1)
        packed = torch.cat((self._sums, dead))
        dist.all_reduce(packed)
        packed = packed.cpu()
        n_names = len(self.names)
        sums = dict(zip(self.names, packed[:n_names].tolist(), strict=True))
        sums["dead"] = float(packed[-1])
        rows = self.n_rows * mesh.n_data
        # All values except the active pairs and dead latents are the same on every rank of a latent
        # group, so their sums over all ranks are divided by the size of the group.
        mean = packed[n_names:-1] / mesh.n_latent / rows
        totals = Totals(
            sums=sums,
            steps=max(self.n_steps, 1) * dist.get_world_size(),
            rows=rows,
            replicas=mesh.n_data,
            shards=mesh.n_latent,
            n_latents=sae.config.n_latents,
            variance=sums["square"] / mesh.n_latent - rows * float(mean.square().sum()),
            grad_norm=float(self.engine.grad_norm),
            lr=self.engine.lr,
        )
        self._reset()
        return {metric.name: metric.reduce(totals) for metric in self.table}


def mfu(tokens_per_s: float, d_model: int, n_latents: int, n_ranks: int) -> float | None:
    """Return the model FLOP utilisation, or None if the device's peak is unknown.

    Only the encoder's dense product is counted, 2 L D FLOP per token, because a sparse step needs
    no other dense product. The convention for dense autograd, 12 L D, would count work that is
    never done.
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
