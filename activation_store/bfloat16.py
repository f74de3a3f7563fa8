"""The Zarr data type `bfloat16`, which zarr-python lacks: tensorstore and zarrs call it the same.

Importing this module registers it, and importing the package sees to that (`zarr_hook.py`). The
entry point group `zarr.data_type` names it too, for versions of zarr-python that load it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeGuard

import ml_dtypes
import numpy as np
from zarr.core.dtype import DataTypeValidationError, ZDType, data_type_registry
from zarr.core.dtype.common import HasEndianness, HasItemSize

DTYPE = np.dtype(ml_dtypes.bfloat16)
_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16(ZDType[Any, Any], HasItemSize, HasEndianness):
    """bfloat16 in Zarr v3, as `ml_dtypes.bfloat16` in NumPy. Zarr v2 has no such type."""

    dtype_cls: ClassVar[Any] = type(DTYPE)
    _zarr_v3_name: ClassVar[str] = "bfloat16"

    @property
    def item_size(self) -> int:
        """Bytes of one number."""
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """Raises: DataTypeValidationError: `dtype` is another one, so that Zarr tries the next."""
        if dtype != DTYPE:
            raise DataTypeValidationError(f"invalid data type {dtype}: expected {DTYPE}")
        return cls()

    def to_native_dtype(self) -> Any:
        """The NumPy data type."""
        return DTYPE

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"invalid data type {data!r}: Zarr v2 has no bfloat16")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"invalid data type {data!r}: expected 'bfloat16'")
        return cls()

    def to_json(self, zarr_format: int) -> Any:
        """The name in Zarr metadata."""
        if zarr_format != 3:
            raise ValueError(f"zarr_format={zarr_format}: expected 3, bfloat16 needs Zarr v3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> TypeGuard[float]:
        return isinstance(data, (int, float, np.number, DTYPE.type))

    def cast_scalar(self, data: object) -> Any:
        """`data` as a bfloat16 number."""
        if not self._check_scalar(data):
            raise TypeError(f"cannot convert {data!r} of {type(data)} to bfloat16")
        return DTYPE.type(data)

    def default_scalar(self) -> Any:
        """0."""
        return DTYPE.type(0)

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        """A fill value: a number, NaN, Infinity, or the bits in hexadecimal (`0x7fc0`)."""
        if isinstance(data, str) and data.startswith("0x"):
            return np.array(int(data, 16), np.uint16).view(DTYPE)[()]
        return self.cast_scalar(_SPECIAL.get(data, data) if isinstance(data, str) else data)

    def to_json_scalar(self, data: object, *, zarr_format: int) -> float | str:
        """The reverse of `from_json_scalar`."""
        value = float(self.cast_scalar(data))
        if np.isnan(value):
            return "NaN"
        if np.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value


data_type_registry.register("bfloat16", BFloat16)
