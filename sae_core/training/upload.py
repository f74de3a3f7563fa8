"""Copy host tensors to a device while it computes, without making the host wait for that work."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Uploader:
    """Copies tensors to a device, on a separate CUDA stream.

    Copies from pinned memory overlap with the work that is queued on the device, and continue after
    `upload` has returned. The memory must not change during the copy, but its owner may reuse it as
    soon as nothing refers to it. The host tensors of an upload are therefore kept until the next
    upload. Each upload first waits for the copy of the previous one, and for the work that was
    queued before it, so that a host far ahead of the device does not fill the device's memory with
    uploads. The device still has the work that was queued between the two uploads.

    Args:
        device: Device to copy to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sent: Sequence[torch.Tensor] = ()
        self._copied: torch.cuda.Event | None = None
        self._used: torch.cuda.Event | None = None

    def upload(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors on the device; those that are already there are returned unchanged.

        Work that is queued afterwards on the device's current stream sees the complete copies.
        """
        if self._stream is None or all(one.device.type == self._device.type for one in tensors):
            return [tensor.to(self._device) for tensor in tensors]
        self._wait_for_last()
        computing = torch.cuda.current_stream(self._device)
        self._used = torch.cuda.Event()
        self._used.record(computing)
        with torch.cuda.stream(self._stream):
            found = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
        self._sent = tensors
        computing.wait_event(self._copied)
        for one in found:
            # Otherwise its memory could be reused while work on the current stream still reads it.
            one.record_stream(computing)
        return found

    def _wait_for_last(self) -> None:
        """Wait for the copies of the last upload and for the work queued before it."""
        for event in (self._copied, self._used):
            if event is not None:
                event.synchronize()
        self._sent = ()
