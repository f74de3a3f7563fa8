"""Mutations of `conf`.

If several tests fail without a protection, the fastest one is listed.
"""

from __future__ import annotations

from tests.mutation.mutation import one_edit

_UNTRUSTED_FILE_TESTS = "tests/fault/test_untrusted_files.py::"

MUTATIONS = (
    one_edit(
        20,
        "addresses with a password are accepted in the config",
        "conf/checks.py",
        "if isinstance(text, str) and _CREDENTIALS.search(text):",
        "if False:",
        f"{_UNTRUSTED_FILE_TESTS}test_an_address_with_a_password_is_refused_without_repeating_it",
    ),
)
