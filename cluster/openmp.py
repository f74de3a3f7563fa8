"""How a rank's threads wait for each other: variables that libgomp reads when it is loaded."""

from __future__ import annotations

import os

_SPINS = "3000"
"""Of libgomp's waiting loop. On 2 cores a step took 63 ms with 3,000, 62 by libgomp's default, 76
with 1,000, 94 passive; beside one busy process 143 with 3,000, 301 with 30,000."""


def waiting_variables(alone: bool) -> dict[str, str]:
    """What to add to the environment of a rank before it imports torch; the user's own stay.

    Ranks that share the cores do not spin. One that has them to itself spins through the gaps
    between two operations, which saves it about a quarter of a step, and no longer: by its own
    default, milliseconds, any other busy process on the machine makes a step ten times as slow.

    Args:
        alone: nothing else of the run uses the cores.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return {}
    if not alone:
        return {"OMP_WAIT_POLICY": "passive"}
    return {} if "GOMP_SPINCOUNT" in os.environ else {"GOMP_SPINCOUNT": _SPINS}
