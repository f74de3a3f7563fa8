"""`python -m tests.mutation`: see `tests.mutation.runner`."""

from __future__ import annotations

import sys

from tests.mutation.runner import main

if __name__ == "__main__":
    sys.exit(main())
