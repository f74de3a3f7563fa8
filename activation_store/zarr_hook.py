"""Teaches zarr-python our data type whenever it is imported, without importing it.

zarr-python 3.1 collects the entry points of `zarr.data_type` but never loads them, and importing
zarr takes 0.7 s, which `--help` and the hot path can do without. So the import itself is watched.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTERS = "activation_store.bfloat16"


class _ZarrImport(MetaPathFinder):
    """Hands `import zarr` on to whoever finds it, and registers the data type afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "zarr":
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module(_REGISTERS)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_bfloat16() -> None:
    """Registers now if zarr is imported already, else as soon as it is."""
    if "zarr" in sys.modules:
        import_module(_REGISTERS)
    else:
        sys.meta_path.insert(0, _ZarrImport())
