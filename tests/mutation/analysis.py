"""Mutations of `analysis`.

If several tests fail without a protection, the fastest one is listed.
"""

from __future__ import annotations

from tests.mutation.mutation import one_edit

MUTATIONS = (
    one_edit(
        16,
        "the report's template does not escape text",
        "analysis/pages/run_page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/unit/analysis/pages/test_run_page.py::test_names_are_escaped_everywhere",
    ),
    one_edit(
        16,
        "names in pictures are not escaped",
        "analysis/pages/svg.py",
        'tip = f"<title>{escape(name)}:',
        'tip = f"<title>{name}:',
        "tests/unit/analysis/pages/test_run_page.py::test_names_are_escaped_everywhere",
    ),
)
