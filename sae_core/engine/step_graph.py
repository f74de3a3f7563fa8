"""A training step as a CUDA graph, which costs the host about as much as a single launch.

A step launches about two hundred operations. Where they are short, as with small batches, the
device would wait for the host between them.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch

from sae_core.architectures.base import StepOutput

_WARM_UP = 3
"""Steps before the capture, in which kernels are compiled and state is allocated."""
_log = logging.getLogger(__name__)


class StepGraph:
    """Runs a step eagerly a few times, then captures it and replays the graph.

    The step must read everything that changes between calls from tensors that stay at the same
    place, and update its state in place. If it cannot be captured, a warning says why, and it
    continues eagerly.

    Args:
        step: The work of a step on the device, given the batch. The host must not wait for the
            device in it.
        discard: Drops what an interrupted step has left behind.
        device: A CUDA device.
    """

    def __init__(
        self,
        step: Callable[[torch.Tensor], StepOutput],
        discard: Callable[[], None],
        device: torch.device,
    ) -> None:
        self._step = step
        self._discard = discard
        self._eager_steps: float = _WARM_UP
        # Autograd remembers the stream of its first step, so the first steps run on this one, too.
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: torch.Tensor | None = None
        self._output: StepOutput | None = None

    def __call__(self, raw: torch.Tensor) -> StepOutput:
        """Run a step.

        Args:
            raw: The batch; its shape and dtype must be the same in every call.

        Returns:
            The step's output. Its tensors are overwritten by the next call.
        """
        if self._graph is None and self._eager_steps == 0:
            self._capture(raw)
        if self._graph is not None:
            assert self._input is not None and self._output is not None
            self._input.copy_(raw)
            self._graph.replay()
            return self._output
        self._eager_steps -= 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            out = self._step(raw)
        torch.cuda.current_stream().wait_stream(self._stream)
        return out

    @property
    def captured(self) -> bool:
        """True once steps are replayed from a graph."""
        return self._graph is not None

    def _capture(self, raw: torch.Tensor) -> None:
        """Capture a step. Nothing is computed by this."""
        graph = torch.cuda.CUDAGraph()
        self._input = torch.empty_like(raw)
        # The graph has its own memory pool. Release the memory of the eager steps first.
        gc.collect()
        torch.cuda.empty_cache()
        try:
            # Other threads, such as those that write checkpoints, may continue meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                out = self._step(self._input)
                self._output = out._replace(loss=out.loss.detach())
        except RuntimeError as error:
            self._discard()
            self._eager_steps = float("inf")
            self._input = None
            _log.warning(
                "the step cannot be captured as a CUDA graph, so its operations are launched one "
                "by one: %s",
                str(error).splitlines()[0],
            )
            return
        self._graph = graph
