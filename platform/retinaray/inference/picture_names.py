"""File names made of ids and category names, which may hold anything."""

from __future__ import annotations

import json
import re
from hashlib import blake2b

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")
_LOOKS_MADE = re.compile(r"-?\d+|.*-[0-9a-f]{12}")
_LONGEST_STEM = 60


def safe_name(value: int | str) -> str:
    """A name of letters, digits, `.`, `_` and `-` that no other value has.

    Whole numbers and short plain texts stay as they are; of others what is plain stays, with 12
    digits of a hash behind it. The text "7" and the number 7 have different names.

    Args:
        value: An image id or the name of a category.
    """
    text = str(value)
    if isinstance(value, int) and len(text) <= _LONGEST_STEM:
        return text
    if isinstance(value, str) and _PLAIN.fullmatch(text) and not _LOOKS_MADE.fullmatch(text):
        return text
    digest = blake2b(json.dumps(value).encode(), digest_size=6).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9]+", "_", text)[:_LONGEST_STEM].strip("_")
    return f"{stem or '_'}-{digest}"
