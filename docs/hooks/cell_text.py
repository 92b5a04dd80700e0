"""Text of docstrings and tables as Markdown; hooks beside it import it."""

from __future__ import annotations

import re


def escape(text: str) -> str:
    """Text for a cell of a table: nothing in it is markup, except code between backticks."""
    pieces = re.split(r"(`[^`]*`)", text.replace("\n", " "))
    shown = [
        piece if piece.startswith("`") else re.sub(r"([*_|\[\]])", r"\\\1", piece)
        for piece in pieces
    ]
    return "".join(shown).replace("<", "&lt;")
