"""The language model and its input text: files, loading, hooks, contexts, an SAE inside it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.language_model.attached_sae import attach

__all__ = ["attach"]


def __getattr__(name: str) -> Any:
    # Import lazily, because most modules of this package are used without torch.
    if name != "attach":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cluster.language_model.attached_sae import attach

    return attach
