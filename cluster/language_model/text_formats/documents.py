"""The kinds of documents: text, ids of tokens, and messages of a chat."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.language_model.errors import TextError
from cluster.language_model.text_formats.fields import as_text, missing_field

Document = str | NDArray[np.int32]
"""A text; the messages of a chat as JSON, `[{"role": ..., "content": ...}, ...]`; or token ids."""
_LARGEST_ID = 2**31 - 1
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def document_of(value: Any, kind: str, field: str, where: str) -> Document | None:
    """Return the document in the value of a field, or None if it is null.

    Args:
        value: The value.
        kind: What a document is, `data.kind`.
        field: Name of the field, for messages.
        where: Place of the record, for messages.

    Raises:
        TextError: If the value is not a document of this kind.
    """
    if kind == "text":
        return as_text(value, field, where)
    if value is None:
        return None
    if kind == "token_ids":
        return _token_ids(value, field, where)
    return json.dumps(_messages(value, field, where), ensure_ascii=False)


def _token_ids(value: Any, field: str, where: str) -> NDArray[np.int32]:
    if isinstance(value, dict):
        raise missing_field(value, field, where)
    ids = np.asarray(value) if isinstance(value, list | np.ndarray) else np.zeros((0, 0))
    if ids.size == 0 and ids.ndim == 1:
        return np.zeros(0, np.int32)
    wrong = ids.ndim != 1 or ids.dtype.kind not in "iu"
    if wrong or ids.min() < 0 or ids.max() > _LARGEST_ID:
        raise TextError(
            f"{where}: expected a list of token ids of 0 or more in the field data.text_field="
            f"{field!r}, because data.kind=token_ids; found {type(value).__name__} "
            f"{str(value)[:60]}"
        )
    return ids.astype(np.int32)


def _messages(value: Any, field: str, where: str) -> list[dict[str, str]]:
    """Return the messages of a chat with the keys `role` and `content`.

    ShareGPT's `from` and `value` are read as well. Content parts that are not text are rejected.
    """
    if isinstance(value, dict):
        raise missing_field(value, field, where)
    messages = []
    for message in value if isinstance(value, list) else [value]:
        known = isinstance(message, dict)
        role = message.get("role", message.get("from")) if known else None
        content = message.get("content", message.get("value")) if known else None
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise TextError(
                f"{where}: expected a list of messages with the texts 'role' and 'content' in the "
                f"field data.text_field={field!r}, because data.kind=chat; found "
                f"{type(message).__name__} {str(message)[:80]}"
            )
        messages.append({"role": _SHAREGPT_ROLES.get(role, role), "content": content})
    return messages
