"""What `ray job submit --working-dir .` takes along, by Ray's own packaging; no cluster."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

MIB = 1024 * 1024
# What people have in a checkout beside the code, by the file that is large in it.
BALLAST = (
    ".git/objects/pack/pack-1.pack",
    ".venv/lib/torch.so",
    ".mypy_cache/cache.json",
    "demo_run/data/images/000.png",
    "runs/cells/photo.jpg",
    "data/images/000.jpg",
    "datasets/coco/train.jpg",
    "datasets.tar",
    "cells_run/tensorboard/events.out.tfevents.1",
    "cells.pth",
    "cells.onnx",
    "cells.engine",
)


@pytest.fixture
def packed(clone: Path, tmp_path: Path) -> Callable[[], zipfile.ZipFile]:
    """Package a copy of the clone with all the ballast, as the submitter does."""
    tree = tmp_path / "tree"
    shutil.copytree(clone, tree)
    for name in BALLAST:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"\0" * MIB)

    def pack() -> zipfile.ZipFile:
        from ray._private.runtime_env.packaging import create_package
        from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

        target = tmp_path / "upload.zip"

        def write(folder: str, excludes: list[str], is_file: bool = False) -> None:
            create_package(folder, target, include_gitignore=True, excludes=excludes)

        upload_working_dir_if_needed(
            {"working_dir": str(tree)}, include_gitignore=True, upload_fn=write
        )
        return zipfile.ZipFile(target)

    return pack


def test_upload_is_small_when_the_tree_is_full(packed: Callable[[], zipfile.ZipFile]) -> None:
    with packed() as package:
        names = {entry.filename for entry in package.infolist()}
        assert not [name for name in BALLAST if name in names]
        assert sum(entry.file_size for entry in package.infolist()) < 5 * MIB
        assert Path(str(package.filename)).stat().st_size < 5 * MIB


def test_upload_holds_the_whole_package(packed: Callable[[], zipfile.ZipFile], clone: Path) -> None:
    needed = [
        path.relative_to(clone).as_posix()
        for folder in ("platform", "jobs")
        for path in (clone / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    # Folders of the package that are named as folders of the root that are left out.
    assert "platform/retinaray/data/coco.py" in needed
    with packed() as package:
        assert set(needed) <= set(package.namelist())
