"""A toy hookpoint kind, added from outside the package: the first positional input of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.language_model.hookpoint_kinds import HookpointKind, Visit

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from conf.hookpoint import Hookpoint


class InputKind(HookpointKind):
    """The first positional input of a module."""

    def attach(self, module: nn.Module, hookpoint: Hookpoint, visit: Visit) -> RemovableHandle:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            replaced = visit(inputs[0] if inputs else None)
            return None if replaced is None else (replaced, *inputs[1:])

        return module.register_forward_pre_hook(hook)
