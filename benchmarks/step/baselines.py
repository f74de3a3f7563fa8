"""Baselines that reimplement the maths of other trainers in plain torch, for any device.

Both do the work of our "step + clip": forward, backward, clipping, fused Adam, unit decoder rows.
Parameters are float32; on a GPU the products are in the benchmark's dtype, as in our step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.step.work import Call, Case, Inputs

_CLIP_NORM = 1.0


def baseline_cases(inputs: Inputs) -> list[Case]:
    """Return the cases of system "baseline"."""
    work = inputs.work
    size = inputs.setup.dtype.itemsize
    state = 32 * work.L * work.D  # two matrices: float32 weights, gradients and both moments
    pre_acts = size * work.B * work.L
    gathered = 3 * 4 * work.B * work.k * work.D  # float32 rows, and a gradient for each matrix
    needs = {"dense autograd": state + 3 * pre_acts, "sparse gather": state + pre_acts + gathered}
    bodies = {"dense autograd": dense_gradients, "sparse gather": sparse_gradients}
    return [
        Case("baseline", op, partial(_step, inputs, body), needs[op], stateful=True)
        for op, body in bodies.items()
    ]


class Autoencoder:
    """Parameters of a TopK SAE with torch's fused Adam.

    Args:
        inputs: Sizes and device.
    """

    def __init__(self, inputs: Inputs) -> None:
        L, D = inputs.work.L, inputs.work.D
        W_dec = F.normalize(torch.randn(L, D, device=inputs.setup.device), dim=1)
        tensors = (W_dec.clone(), W_dec.new_zeros(L), W_dec, W_dec.new_zeros(D))
        self.parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = self.parameters
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-6, fused=True)

    @torch.no_grad()
    def update(self) -> None:
        """Clip the gradients, update, renormalise the decoder rows and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


def dense_gradients(model: Autoencoder, inputs: Inputs) -> None:
    """Compute gradients with autograd through dense latents [B, L] and a dense decoder product.

    Args:
        model: Receives the gradients of the mean squared error.
        inputs: Batch and dtype of the products.
    """
    x, setup = inputs.raw, inputs.setup
    with torch.autocast(setup.device.type, setup.dtype, enabled=setup.dtype != torch.float32):
        pre_acts = F.linear(x - model.b_dec, model.W_enc, model.b_enc)
        best = pre_acts.topk(inputs.work.k, dim=1)
        latents = torch.zeros_like(pre_acts).scatter(1, best.indices, best.values.relu())
        recon = latents @ model.W_dec + model.b_dec
    (recon.float() - x).square().mean().backward()


@torch.no_grad()
def sparse_gradients(model: Autoencoder, inputs: Inputs) -> None:
    """Compute gradients by hand: `torch.topk`, gathered decoder rows [B, k, D], `index_add_`.

    Only the encoder product is dense.

    Args:
        model: Receives the gradients of the mean squared error.
        inputs: Batch and dtype of the encoder product.
    """
    centred = inputs.raw - model.b_dec
    dtype = inputs.setup.dtype
    operands = (centred.to(dtype), model.W_enc.to(dtype), model.b_enc.to(dtype))
    values, latents = F.linear(*operands).topk(inputs.work.k, dim=1)
    values = values.float().relu()
    rows = model.W_dec[latents]
    error = torch.bmm(values[:, None], rows)[:, 0] - centred
    error *= 2 / error.numel()
    dvalues = torch.bmm(rows, error[:, :, None])[:, :, 0] * (values > 0)
    flat = latents.view(-1)

    def summed(weights: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        pairs = (weights[:, :, None] * matrix[:, None]).view(-1, matrix.shape[1])
        return torch.zeros_like(model.W_dec).index_add_(0, flat, pairs)

    model.W_dec.grad = summed(values, error)
    model.W_enc.grad = summed(dvalues, centred)
    model.b_enc.grad = torch.zeros_like(model.b_enc).index_add_(0, flat, dvalues.view(-1))
    model.b_dec.grad = error.sum(0) - model.b_enc.grad @ model.W_enc


def _step(inputs: Inputs, gradients: Callable[[Autoencoder, Inputs], None]) -> Call:
    model = Autoencoder(inputs)

    def call() -> None:
        gradients(model, inputs)
        model.update()

    return call
