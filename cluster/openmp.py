"""Control how OpenMP threads wait, with variables that libgomp reads when torch is imported."""

from __future__ import annotations

import os

_SPINS = "3000"
"""Iterations of libgomp's waiting loop before a thread sleeps.

Measured on 2 cores: a step took 63 ms with 3,000 iterations, 62 ms with libgomp's default, 76 ms
with 1,000 and 94 ms with passive waiting. Next to one busy process, it took 143 ms with 3,000 and
301 ms with 30,000.
"""


def waiting_variables(alone: bool) -> dict[str, str]:
    """Return the variables to add to a process's environment before it imports torch.

    Processes that share the cores do not spin while they wait. A process with the cores to itself
    spins just long enough to bridge the gap between two operations, which saves about a quarter of
    a training step. libgomp's default is to spin for milliseconds. With that default, any other
    busy process on the machine makes a step ten times as slow.

    The driver sets a lone process's variables for itself, and the processes that it starts inherit
    them. This function therefore replaces inherited values, but keeps values that a user has set.

    Args:
        alone: Whether no other process of the run uses the cores.
    """
    by_user = os.environ.get("GOMP_SPINCOUNT", _SPINS) != _SPINS
    if by_user or "OMP_WAIT_POLICY" in os.environ:
        return {}
    if alone:
        return {"GOMP_SPINCOUNT": _SPINS}
    # The spin count takes precedence over the wait policy, so both must be set.
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
