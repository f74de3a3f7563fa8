"""The Zarr data type `bfloat16`, which zarr-python lacks. tensorstore and zarrs use the same name.

Importing this module registers the data type. `zarr_registration.py` imports the module when zarr
is imported. The data type is also listed in the entry point group `zarr.data_type`, for versions of
zarr-python that load this group.
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
    """Zarr v3 data type for NumPy arrays of `ml_dtypes.bfloat16`. Zarr v2 does not support it."""

    dtype_cls: ClassVar[Any] = type(DTYPE)
    _zarr_v3_name: ClassVar[str] = "bfloat16"

    @property
    def item_size(self) -> int:
        """Size of one value in bytes."""
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """Create the Zarr data type from a NumPy data type.

        Raises:
            DataTypeValidationError: If `dtype` is not bfloat16. Zarr then tries other data types.
        """
        if dtype != DTYPE:
            raise DataTypeValidationError(f"invalid data type {dtype}: expected {DTYPE}")
        return cls()

    def to_native_dtype(self) -> Any:
        """Return the NumPy data type."""
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
        """Return the name of the data type in Zarr metadata."""
        if zarr_format != 3:
            raise ValueError(f"zarr_format={zarr_format}: expected 3; bfloat16 needs Zarr v3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> TypeGuard[float]:
        return isinstance(data, (int, float, np.number, DTYPE.type))

    def cast_scalar(self, data: object) -> Any:
        """Convert a number to bfloat16."""
        if not self._check_scalar(data):
            raise TypeError(f"cannot convert {data!r} of {type(data)} to bfloat16")
        return DTYPE.type(data)

    def default_scalar(self) -> Any:
        """Return the default fill value, 0."""
        return DTYPE.type(0)

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        """Parse a fill value: a number, "NaN", "Infinity", or hexadecimal bits such as "0x7fc0"."""
        if isinstance(data, str) and data.startswith("0x"):
            return np.array(int(data, 16), np.uint16).view(DTYPE)[()]
        return self.cast_scalar(_SPECIAL.get(data, data) if isinstance(data, str) else data)

    def to_json_scalar(self, data: object, *, zarr_format: int) -> float | str:
        """Convert a fill value to JSON. This is the inverse of `from_json_scalar`."""
        value = float(self.cast_scalar(data))
        if np.isnan(value):
            return "NaN"
        if np.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value


data_type_registry.register("bfloat16", BFloat16)
