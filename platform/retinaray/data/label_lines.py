"""Class names as DeepStream writes them: what labels.txt holds, and a KITTI dump gives back.

The exported bundle writes these lines and the dump's reader looks them up, so that both must agree.
"""

from __future__ import annotations

from retinaray.data.coco import CategoryTable

# NvDsObjectMeta keeps 128 bytes with the closing zero, and cuts what is longer.
_MAX_BYTES = 127


def label_lines(categories: CategoryTable) -> tuple[str, ...]:
    """One line per class, in index order, each different from all others.

    A name stays as it is unless DeepStream could not give it back: a line break or a semicolon
    would end it there, and beyond 127 bytes it would be cut.
    """
    lines: list[str] = []
    for category in categories.categories:
        # Blanks alone would read as no label at all.
        name = " ".join(category.name.replace(";", ",").split()) or "class"
        line = _cut(name, _MAX_BYTES)
        if line in lines:
            suffix = f" ({' '.join(str(category.id).replace(';', ',').split())})"
            line = _cut(name, _MAX_BYTES - len(suffix.encode())) + suffix
        while line in lines:
            line = _cut(line, _MAX_BYTES - 1) + "'"
        lines.append(line)
    return tuple(lines)


def _cut(text: str, num_bytes: int) -> str:
    return text.encode()[: max(0, num_bytes)].decode(errors="ignore")
