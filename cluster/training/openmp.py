"""OpenMP settings of a rank: environment variables that libgomp reads when it is loaded."""

from __future__ import annotations

import os

_SPINS = "3000"
"""Iterations of libgomp's waiting loop before a thread sleeps.

Measured on 2 cores: a step took 63 ms with 3,000, 62 ms with libgomp's default, 76 ms with 1,000
and 94 ms with passive waiting; next to one busy process 143 ms with 3,000 and 301 ms with 30,000.
"""


def waiting_variables(alone: bool) -> dict[str, str]:
    """Return the variables to add to a rank's environment before it imports torch.

    Variables that the user has set are left alone.

    Ranks that share the cores do not spin while they wait. A rank with the cores to itself spins
    just long enough to bridge the gap between two operations, which saves about a quarter of a
    step. libgomp's default is to spin for milliseconds; with it, any other busy process on the
    machine makes a step ten times as slow.

    Args:
        alone: whether no other process of the run uses the cores.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return {}
    if not alone:
        return {"OMP_WAIT_POLICY": "passive"}
    return {} if "GOMP_SPINCOUNT" in os.environ else {"GOMP_SPINCOUNT": _SPINS}
