"""An SAE inside a language model: read its latents, change them, and take gradients through them.

Shape legend: B texts, T tokens of a forward pass, D width of the hookpoint, K active latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.language_model.hooks import RunningPass, replaced_by

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sae_core.inference import SAE

Edit = Callable[["Tensor"], "Tensor"]
"""Function from the values of one latent, [B, T] float32, to its new values."""


@dataclass
class AttachedSAE:
    """An SAE that runs inside a model; created by `attach`.

    Latents are computed at every position but the first token of a text (usually BOS, whose
    activation is an attention sink that SAEs are not trained on) and padding. Edits apply to the
    forward passes that follow, generation included. `values`, `indices` and `error` exist after the
    first pass.
    """

    sae: SAE
    keep_error: bool = True
    """Whether what the SAE does not reconstruct is added to its output."""
    values: Tensor = field(init=False)
    """Values of the active latents in the last forward pass, [B, T, K] float32; 0 where the SAE
    does not run. Where gradients are recorded, `values.grad` has the gradient with respect to them
    after a backward pass."""
    indices: Tensor = field(init=False)
    """Indices of the active latents, [B, T, K] int64."""
    error: Tensor = field(init=False)
    """Activations minus their reconstruction, before any edit, [B, T, D] float32; 0 where the SAE
    does not run. It has no gradient."""
    _edits: dict[int, Edit] = field(default_factory=dict)

    def set(self, latent: int, value: float) -> None:
        """Give a latent this value wherever the SAE runs."""
        self.edit(latent, lambda values: values.new_full(values.shape, value))

    def add(self, latent: int, value: float) -> None:
        """Add to the value of a latent wherever the SAE runs, even where it is not active."""
        self.edit(latent, lambda values: values + value)

    def scale(self, latent: int, factor: float) -> None:
        """Multiply the value of a latent."""
        self.edit(latent, lambda values: values * factor)

    def ablate(self, *latents: int) -> None:
        """Set latents to 0."""
        for latent in latents:
            self.set(latent, 0.0)

    def edit(self, latent: int, edit: Edit) -> None:
        """Replace the values of a latent, [B, T], by those that `edit` returns.

        Raises:
            IndexError: If the SAE has no such latent.
        """
        if not 0 <= latent < self.sae.config.n_latents:
            raise IndexError(
                f"latent {latent}: expected 0 to {self.sae.config.n_latents - 1} of this SAE"
            )
        self._edits[latent] = edit

    def clear(self) -> None:
        """Remove all edits."""
        self._edits.clear()

    def run(self, x: Tensor, applies: Tensor) -> Tensor:
        """Return the activations that the model continues with instead of `x`.

        Args:
            x: [B, T, D] activations in the model's dtype.
            applies: [B, T] bool: positions at which the SAE runs.
        """
        import torch

        device = self.sae.b_dec.device
        rows, runs = x.to(device), applies.to(device)[..., None]
        values, indices = self.sae.encode_topk(rows)
        values = values * runs
        if values.requires_grad:
            values.retain_grad()
        recon = self.sae.decode_topk(values, indices)
        error = ((rows.float() - recon) * runs).detach()
        self.values, self.indices, self.error = values, indices, error
        out = recon + error if self.keep_error else recon
        for latent, edit in self._edits.items():
            old = (values * (indices == latent)).sum(-1)
            out = out + (edit(old) - old)[..., None] * self.sae.W_dec[latent].float()
        if self.keep_error and not self._edits and not torch.is_grad_enabled():
            return x  # bit for bit the model's own activations
        return torch.where(runs, out.to(x.dtype), rows).to(x.device)


@contextmanager
def attach(
    model: nn.Module, hookpoint: str, sae: SAE, *, keep_error: bool = True
) -> Iterator[AttachedSAE]:
    """Run an SAE inside a Hugging Face model during the block.

    With `keep_error`, a pass without edits gives the same output as the model alone. Gradients of
    later layers reach the latents, and through them the activations, but not through the error.

    Args:
        model: The language model.
        hookpoint: Tensor to replace, as in `model.hookpoints`: `model.layers.9`, or
            `module@kind[option=value,...]`.
        sae: The SAE of that hookpoint, from `sae_core.load_sae`. It may be on another device.
        keep_error: Whether to add what the SAE does not reconstruct.

    Yields:
        The attached SAE, with the latents of the last pass and the methods that change them.

    Raises:
        ModelError: If the module does not exist or (from the forward pass) has no tensor
            [B, T, D] there.
        ShapeError: From the forward pass, if the SAE has another width.
        ConfigError: If the hookpoint is malformed, or its kind or options do not exist.
    """
    attached = AttachedSAE(sae, keep_error)

    def replace(x: Tensor, running: RunningPass) -> Tensor:
        return attached.run(x, running.inside_texts(x))

    with replaced_by(model, hookpoint, replace):
        yield attached
