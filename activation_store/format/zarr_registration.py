"""Register the bfloat16 data type when zarr-python is imported, without importing it here.

zarr-python 3.1 collects the entry points in the group `zarr.data_type` but never loads them.
Importing zarr takes 0.7 s, which would slow down `--help` and the readers of this package. So an
import hook registers the data type as soon as any other code imports zarr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTERS = "activation_store.format.bfloat16"


class _ZarrImport(MetaPathFinder):
    """Import hook that registers the data type right after zarr has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find zarr with the other finders and wrap its loader. Ignore all other modules."""
        if fullname != "zarr":
            return None
        sys.meta_path.remove(self)  # so that `util.find_spec` asks only the other finders
        spec = util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module(_REGISTERS)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # replaced on purpose
        return spec


def register_bfloat16() -> None:
    """Register the data type now if zarr is already imported, or else when zarr is imported."""
    if "zarr" in sys.modules:
        import_module(_REGISTERS)
    else:
        sys.meta_path.insert(0, _ZarrImport())
