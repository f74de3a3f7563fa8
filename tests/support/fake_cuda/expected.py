"""Waits that the fake CUDA device reports and that are expected, each with its reason.

A test fails if an entry is no longer reported.
"""

from __future__ import annotations

_UPLOAD = (
    "bounds the memory of uploads: the copies run on their own stream, and the device still has "
    "the work that was queued since the last upload"
)

_DENSE = (
    "lists the latents that were used, whose rows of the dense gradient are written; only with "
    "optim.update=dense, as under ZeRO 1"
)
_CAPTURE = "torch waits once before it captures a CUDA graph"

EXCEPTIONS = {
    "sae_core/training/upload.py: Uploader._wait_for_last: Event.synchronize": _UPLOAD,
    "sae_core/kernels/triton/segments.py: row_gradients: nonzero": _DENSE,
    "sae_core/kernels/triton/segments.py: row_gradients: unique_consecutive": _DENSE,
    "sae_core/engine/step_graph.py: StepGraph._capture: torch.cuda.synchronize": _CAPTURE,
}
"""Waits that a step may have, by `Wait.key`."""
