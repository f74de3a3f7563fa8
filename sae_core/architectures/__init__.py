"""SAE architectures, one file each; `build_sae` builds the configured one."""

from sae_core.architectures.base import StepOutput
from sae_core.architectures.registry import build_sae
from sae_core.architectures.topk import TopKSAE

__all__ = ["StepOutput", "TopKSAE", "build_sae"]
