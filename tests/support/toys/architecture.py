"""A toy architecture and a toy kernel body, added to their registries from outside the packages.

The toy SAE is dense: `latents = relu(pre_acts - threshold)` with a penalty on their sum, and one
threshold per latent. Unlike TopK, it has neither a sparse gradient nor a fixed number of active
latents, and it has an additional parameter vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from foundation.errors import ConfigError
from sae_core.architectures.base import SparseAutoencoder, StepOutput
from sae_core.architectures.registry import ARCHITECTURES, Architecture, LatentVector
from sae_core.architectures.settings import SAEConfig
from sae_core.distributed.mesh import Mesh
from sae_core.inference import SAE
from sae_core.kernels import Kernels
from sae_core.kernels.registry import KERNELS, KernelBody
from sae_core.kernels.stock.body import StockKernels
from sae_core.training_metrics import TrainingMetric, mean_over_steps
from tests.support.toys.slots import SLOTTED


@dataclass
class ToyConfig(SAEConfig):
    """Settings of the toy SAE."""

    architecture: str = "toy"
    penalty: float = 0.01
    """Weight of the latents' sum in the loss."""

    def validate(self) -> None:
        super().validate()
        if self.penalty < 0:
            raise ConfigError("sae.penalty", self.penalty, "0 or more")


class ToySAE(SparseAutoencoder):
    """The toy in training; its encoder gives `b_dec` no gradient."""

    config: ToyConfig

    def __init__(
        self, config: ToyConfig, d_model: int, mesh: Mesh, kernels: Kernels, seed: int
    ) -> None:
        super().__init__(config, d_model, mesh, kernels, seed)
        self.threshold = self.add_rows("threshold", torch.full_like(self.b_enc, 0.1))

    def forward(self, raw: torch.Tensor) -> StepOutput:
        x = self.normalise(raw)
        latents = self._encode(x - self.b_dec.detach())
        error = (x - self.b_dec - self._decode(latents)).square().sum()
        # The sum of the other shards' latents has no gradient here.
        size = self._over_shards(latents.sum() / len(x))
        return StepOutput(
            loss=error / x.numel() + self.config.penalty * size,
            squared_error=error.detach(),
            fired=(latents > 0).any(0),
            n_active=(latents > 0).sum(),
            metrics={"size": size.detach()},
            input_total=x.sum(0),
            input_square=x.square().sum(),
        )

    @torch.no_grad()
    def reconstruct_centred(self, centred: torch.Tensor) -> torch.Tensor:
        return self._decode(self._encode(centred))

    def _encode(self, centred: torch.Tensor) -> torch.Tensor:
        return (centred @ self.W_enc.T + self.b_enc - self.threshold).relu()

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._over_shards(latents @ self.W_dec)

    def _over_shards(self, own: torch.Tensor) -> torch.Tensor:
        """Return the sum over the latent group, whose gradient is that of this shard's part."""
        if self.latent_group is None:
            return own
        total = own.detach().clone()
        dist.all_reduce(total, group=self.latent_group)
        return own + (total - own.detach())


class ToyInference(SAE):
    """The trained toy on raw activations."""

    threshold: torch.Tensor

    def encode_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = ((x - self.b_dec) @ self.W_enc.T + self.b_enc - self.threshold).relu()
        most = int((latents > 0).sum(-1).max())
        return latents.topk(most, dim=-1)


TOY = Architecture(
    settings=ToyConfig,
    training="tests.support.toys.architecture:ToySAE",
    inference="tests.support.toys.architecture:ToyInference",
    metrics=(
        TrainingMetric("size", "", "sum of the latents, mean over rows", mean_over_steps("size")),
    ),
    vectors=(LatentVector("threshold", in_activation_units=True),),
)


class CopyingKernels(StockKernels):
    """Stock kernels that keep copies of the matrices, like low-precision kernels."""

    name = "copying"
    copy_dtype: torch.dtype | None = torch.float32


def build_copying(compute_dtype: torch.dtype, tf32: bool, prefilter: str) -> Kernels:
    """Build `CopyingKernels`."""
    return CopyingKernels(compute_dtype)


COPYING = KernelBody("tests.support.toys.architecture:build_copying")


@contextmanager
def registered_toys() -> Iterator[None]:
    """Add the toy architecture `toy` and the kernel bodies `copying` and `slotted`."""
    with ExitStack() as stack:
        stack.enter_context(ARCHITECTURES.registered("toy", TOY))
        stack.enter_context(KERNELS.registered("copying", COPYING))
        stack.enter_context(KERNELS.registered("slotted", SLOTTED))
        yield
