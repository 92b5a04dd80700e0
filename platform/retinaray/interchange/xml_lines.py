"""XML as a plain tree whose elements know their lines, for messages that name them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from retinaray.errors import DatasetError

_DEEPEST = 32


@dataclass
class Element:
    """One element.

    Attributes:
        tag: Its name.
        place: File and line, for messages.
        text: Its text, without blanks at the ends.
        children: Elements in it.
    """

    tag: str
    place: str
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find_all(self, tag: str) -> Iterator[Element]:
        """Children of that name."""
        return (child for child in self.children if child.tag == tag)

    def find(self, tag: str) -> Element | None:
        """The first child of that name."""
        return next(self.find_all(tag), None)

    def need(self, tag: str) -> Element:
        """The first child of that name.

        Raises:
            DatasetError: If there is none.
        """
        child = self.find(tag)
        if child is None:
            raise DatasetError(f"{self.place}: expected <{tag}> in <{self.tag}>, found none")
        return child


def parse_xml(path: Path) -> Element:
    """Read a file.

    A document type, which label files do not have, is refused: entities could make a small file
    huge.

    Raises:
        DatasetError: If it cannot be read, or is no such XML; with the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot read it: {error.strerror}") from error
    root = Element("", str(path))
    stack = [root]
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(tag: str, _: Any) -> None:
        element = Element(tag, f"{path}, line {parser.CurrentLineNumber}")
        if len(stack) > _DEEPEST:
            raise DatasetError(f"{element.place}: expected labels, found elements nested too deep")
        stack[-1].children.append(element)
        stack.append(element)

    def end(_: str) -> None:
        element = stack.pop()
        element.text = element.text.strip()

    def add_text(text: str) -> None:
        stack[-1].text += text

    def refuse(*_: Any) -> None:
        raise DatasetError(
            f"{path}, line {parser.CurrentLineNumber}: expected no <!DOCTYPE>; take it out"
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = add_text
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        reason = expat.errors.messages[error.code]
        raise DatasetError(f"{path}, line {error.lineno}: expected XML, found {reason}") from error
    return root.children[0]
