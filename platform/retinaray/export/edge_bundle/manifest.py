"""What a bundle is and the hashes of its files, so that it can be checked wherever it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retinaray.artifact import hash_content
from retinaray.errors import ExportError

MANIFEST_NAME = "manifest.json"
SUMS_NAME = "SHA256SUMS"
_FORMAT = "retinaray-edge-bundle-1"


def add_manifest(files: Mapping[str, bytes], facts: Mapping[str, Any]) -> dict[str, bytes]:
    """The files, and the two that describe them.

    Args:
        files: Name in the bundle to content.
        facts: What the bundle is, as plain values.

    Returns:
        All files by rising name, with manifest.json (all hashes, for programs) and SHA256SUMS (for
        `sha256sum -c` on the device).
    """
    listed = {
        name: {"bytes": len(content), "sha256": hash_content(content)}
        for name, content in sorted(files.items())
    }
    manifest = {"format": _FORMAT, **facts, "files": listed}
    complete = {**files, MANIFEST_NAME: (json.dumps(manifest, indent=1) + "\n").encode()}
    sums = [f"{hash_content(content)}  {name}\n" for name, content in sorted(complete.items())]
    complete[SUMS_NAME] = "".join(sums).encode()
    return dict(sorted(complete.items()))


def check_bundle(folder: Path) -> dict[str, Any]:
    """Compare a bundle's files with its manifest.

    Args:
        folder: The bundle. Files that it did not come with, such as the engine, are passed over.

    Returns:
        The manifest.

    Raises:
        ExportError: If there is no readable manifest, or files are missing or damaged, each named.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
        listed = {str(name): str(entry["sha256"]) for name, entry in manifest["files"].items()}
        is_ours = manifest["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{path}: expected the manifest of a bundle written by `retinaray bundle`: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not is_ours:
        raise ExportError(f"{path}: expected format {_FORMAT!r}, found {manifest['format']!r}")
    faults = [
        fault for name, digest in listed.items() if (fault := _find_fault(folder, name, digest))
    ]
    if faults:
        raise ExportError(
            f"{folder}: {len(faults)} of {len(listed)} files are not as they were written: "
            f"{', '.join(faults)}; copy the bundle again"
        )
    return dict(manifest)


def _find_fault(folder: Path, name: str, digest: str) -> str:
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        return f"{name} ({error.strerror or error})"
    return "" if hash_content(content) == digest else f"{name} (another SHA-256)"
