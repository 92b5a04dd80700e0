from __future__ import annotations

import pytest

from retinaray.data.image_paths import resolve_image_uri
from retinaray.errors import DatasetError


@pytest.mark.parametrize("root", ["/data/images", "images/", "s3://bucket/a/b", "s3://bucket/"])
@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "sub/deeper/a.jpg",
        "day 1#t=1055.mp4?x=%20&y.jpg",
        "写真/ñ ü.jpg",
        "..a.jpg",
        "a..b/c...jpg",
        ".hidden/a.jpg",
        "-rf",
        "a//b.jpg",
        "win\\a.jpg",
        "time 12:30.jpg",
        "~/a.jpg",
        "$HOME.jpg",
    ],
)
def test_resolve_image_uri_takes_names_literally(root: str, name: str) -> None:
    assert resolve_image_uri(root, name) == f"{root.rstrip('/')}/{name}"


@pytest.mark.parametrize(
    ("name", "folded"),
    [("./a.jpg", "a.jpg"), ("x/../a.jpg", "a.jpg"), ("x/./y/a.jpg", "x/y/a.jpg")],
)
def test_resolve_image_uri_folds_dots_that_stay_inside(name: str, folded: str) -> None:
    assert resolve_image_uri("s3://bucket/p", name) == f"s3://bucket/p/{folded}"


@pytest.mark.parametrize("root", ["/data/images", "s3://bucket/prefix"])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty"),
        ("/etc/passwd", "is absolute"),
        ("//host/share/a.jpg", "is absolute"),
        ("\\\\host\\share\\a.jpg", "is absolute"),
        ("C:\\a.jpg", "drive letter"),
        ("c:a.jpg", "drive letter"),
        ("s3://other/a.jpg", "URL scheme"),
        ("http://host/a.jpg", "URL scheme"),
        ("file:///etc/passwd", "URL scheme"),
        ("..", "leads out"),
        ("../a.jpg", "leads out"),
        ("x/../../a.jpg", "leads out"),
        ("x/..//../a.jpg", "leads out"),
        ("..\\a.jpg", "leads out"),
        ("x\\..\\..\\a.jpg", "leads out"),
        ("x/..\\../a.jpg", "leads out"),
        ("a\0.jpg", "contains NUL"),
        (".", "names a folder"),
        ("x/..", "names a folder"),
        ("x/", "names a folder"),
    ],
)
def test_resolve_image_uri_refuses_names_that_leave_the_folder(
    root: str, name: str, problem: str
) -> None:
    with pytest.raises(DatasetError, match=f"{problem}.*; expected a name relative to {root}"):
        resolve_image_uri(root, name)


def test_resolve_image_uri_refuses_an_empty_root() -> None:
    with pytest.raises(DatasetError, match="image folder is empty"):
        resolve_image_uri("", "a.jpg")


def test_resolve_image_uri_keeps_the_file_system_root() -> None:
    assert resolve_image_uri("/", "a.jpg") == "/a.jpg"
