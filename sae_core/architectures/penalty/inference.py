"""Inference with SAEs whose number of active latents depends on the data."""

from __future__ import annotations

from abc import abstractmethod

import torch

from sae_core.architectures.penalty.settings import PenaltyConfig
from sae_core.inference import SAE

_BLOCK_ELEMENTS = 1 << 24
"""Most dense latents that are computed at a time: 64 MiB."""


class PenaltyInference(SAE):
    """A trained SAE with a varying number of active latents; see `SAE` for the arguments.

    A subclass implements `dense_latents`.
    """

    config: PenaltyConfig

    @abstractmethod
    def dense_latents(self, projected: torch.Tensor) -> torch.Tensor:
        """Return the latents [N, l], 0 where not active. It may change its argument.

        Args:
            projected: [N, l] float32, `(x - b_dec) @ W_enc.T`.
        """

    def encode_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the active latents of each row; see `SAE.encode_rows`.

        Dense latents are computed for a block of rows at a time, so that memory grows with the
        number of active latents only.

        Args:
            x: [N, D] float32 raw activations.

        Returns:
            Values [N, K] float32 and indices [N, K] int64, where K is the largest number of latents
            that are active in one of these rows. If fewer are active, the remaining values are 0.
        """
        W_enc = self.W_enc
        step = max(1, _BLOCK_ELEMENTS // max(1, len(W_enc)))
        blocks = []
        for rows in (x - self.b_dec).split(step):
            latents = self.dense_latents(_project(rows, W_enc))
            most = int((latents > 0).sum(1).max()) if latents.numel() else 0
            # A stable sort would be needed for ties to go to the lowest index. Only values of 0,
            # which are left out, can tie in practice.
            values, indices = latents.topk(most, dim=1)
            blocks.append((values, indices))
        width = max((values.shape[1] for values, _ in blocks), default=0)
        return (
            _stacked([values for values, _ in blocks], width, x.device, torch.float32),
            _stacked([indices for _, indices in blocks], width, x.device, torch.int64),
        )


def _project(rows: torch.Tensor, W_enc: torch.Tensor) -> torch.Tensor:
    """Return `rows @ W_enc.T` in float32, [N, l]; 16-bit weights are converted in pieces."""
    if W_enc.dtype == torch.float32:
        return rows @ W_enc.T
    step = max(1, _BLOCK_ELEMENTS // W_enc.shape[1])
    return torch.cat([rows @ part.float().T for part in W_enc.split(step)], dim=1)


def _stacked(
    blocks: list[torch.Tensor], width: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Stack blocks of rows of different widths, filling up with 0."""
    out = torch.zeros(sum(len(part) for part in blocks), width, dtype=dtype, device=device)
    first = 0
    for part in blocks:
        out[first : first + len(part), : part.shape[1]] = part
        first += len(part)
    return out
