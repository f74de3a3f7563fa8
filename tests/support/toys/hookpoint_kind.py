"""A toy hookpoint kind, added from outside the package: the first positional input of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.language_model.hookpoint_kinds import HookpointKind, Visit, hidden_states
from foundation.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from conf.hookpoint import Hookpoint


class TakenKind(HookpointKind):
    """The first positional input of a module; with option `head`, only the columns of one head."""

    def check(self, hookpoint: Hookpoint) -> None:
        if any(name != "head" or not value.isdecimal() for name, value in hookpoint.options):
            raise ConfigError("model.hookpoints", str(hookpoint), "no option but head=NUMBER")

    def width(self, hookpoint: Hookpoint, config: Any) -> int:
        whole = super().width(hookpoint, config)
        return whole // config.num_attention_heads if hookpoint.options else whole

    def attach(
        self, model: nn.Module, module: nn.Module, hookpoint: Hookpoint, visit: Visit
    ) -> RemovableHandle:
        columns = slice(None)
        if hookpoint.options:
            width, head = self.width(hookpoint, model.config), int(hookpoint.options[0][1])
            columns = slice(head * width, (head + 1) * width)

        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            hidden = hidden_states(hookpoint, inputs[0] if inputs else None)
            part = visit(hidden[..., columns])
            if part is None:
                return None
            replaced = hidden.clone()
            replaced[..., columns] = part
            return (replaced, *inputs[1:])

        return module.register_forward_pre_hook(hook)
