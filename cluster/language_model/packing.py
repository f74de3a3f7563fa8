"""Run a model on contexts with padding or with documents that must not attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.language_model.errors import ModelError
from cluster.language_model.hooks import capture, rows_agree
from cluster.language_model.sizes import n_embeddings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cluster.language_model.tokens.contexts import ModelInputs


def to_device(inputs: ModelInputs, device: str | torch.device) -> dict[str, Tensor]:
    """Return the arguments of the model's forward pass as tensors on a device."""
    import torch

    return {name: torch.from_numpy(value).to(device) for name, value in inputs.given().items()}


def require_document_masks(model: nn.Module, hookpoints: Sequence[str]) -> None:
    """Check that restarting the positions keeps the model's attention within a document.

    Two contexts differ in their first document only. The rows of their second document must agree.

    Raises:
        ModelError: If this is not the case.
    """
    import torch

    length = 8
    device = next(model.parameters()).device
    n_ids = n_embeddings(model)
    ids = torch.arange(2 * length, device=device).repeat(2, 1)
    ids[1, :length] += length
    positions = torch.arange(length, device=device).repeat(2, 2)
    rows = capture(model, hookpoints, ids % n_ids, position_ids=positions)
    alone = capture(model, hookpoints, ids[:, length:] % n_ids)
    for name in hookpoints:
        second = rows[name][:, length:]
        if not (rows_agree(second, second.flip(0)) and rows_agree(second, alone[name])):
            raise ModelError(
                f"data.packing=masked: {type(model).__name__} attends across the documents of a "
                f"context, because it does not use positions to separate them ({name}); set "
                "data.packing=separate or joined"
            )
