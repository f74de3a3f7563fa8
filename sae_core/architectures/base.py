"""What an architecture is to the rest of the trainer."""

from __future__ import annotations

from typing import NamedTuple

import torch


class StepOutput(NamedTuple):
    """The loss of one step and its metrics; all but `loss` are detached."""

    loss: torch.Tensor
    """Scalar; the mean over data replicas is the loss of the global batch."""
    squared_error: torch.Tensor
    """Scalar: squared error summed over this replica's rows and D, for normalised inputs."""
    aux_loss: torch.Tensor
    """Scalar: auxiliary loss before its coefficient.

    It is scaled so that the mean over data replicas is the auxiliary loss of the global batch.
    """
    fired: torch.Tensor
    """[l] bool: local latents that fired on any row of this replica's batch."""
    n_active: torch.Tensor
    """Scalar: number of active (row, latent) pairs of this rank."""
