"""Copy host tensors to a device without making the host wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Uploader:
    """Copies tensors to a device, in the order of its current stream.

    A copy from pinned memory continues after `upload` has returned. The memory must not change
    during the copy, but its owner may reuse it as soon as nothing refers to it. The host tensors of
    an upload are therefore kept until the next upload, which first waits for the copy to finish.

    Args:
        device: Device to copy to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: Sequence[torch.Tensor] = ()
        self._copied: torch.cuda.Event | None = None

    def upload(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors on the device; those that are already there are returned unchanged.

        Work that is queued on the device afterwards sees the complete copies.
        """
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        self._sent = ()
        found = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        copied = any(one is not other for one, other in zip(found, tensors, strict=True))
        if copied and self._device.type == "cuda":
            self._sent = tensors
            self._copied = torch.cuda.Event()
            self._copied.record()
        return found
