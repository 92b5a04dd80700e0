"""Where an image of a COCO file lies: `file_name` joined to a folder or prefix, never outside."""

import posixpath
import re

from retinaray.errors import DatasetError

_DRIVE_OR_SCHEME = re.compile(r"[A-Za-z]:|[A-Za-z][A-Za-z0-9+.-]*://")


def file_name_problem(file_name: str) -> str | None:
    r"""Why a name may not be joined to a folder, or None.

    Refused are names that lead out of the folder, whatever system wrote them: absolute ones, drive
    letters, URLs, `..` past the start (also between backslashes), NUL, and names of a folder.
    """
    if not file_name:
        return "is empty"
    if "\0" in file_name:
        return "contains NUL"
    if file_name[0] in "/\\":
        return "is absolute"
    if _DRIVE_OR_SCHEME.match(file_name):
        return "has a drive letter or URL scheme"
    normal = posixpath.normpath(file_name.replace("\\", "/"))
    if normal == ".." or normal.startswith("../"):
        return "leads out of the image folder"
    if normal == "." or file_name[-1] in "/\\":
        return "names a folder"
    return None


def resolve_image_uri(images_root: str, file_name: str) -> str:
    """Join an image's name to a local folder or an `s3://` prefix.

    The name is taken literally: `#`, `?`, `=`, `%`, spaces and any script are fine, subfolders too.
    Only `.` and `..` parts are folded away. Links inside the folder are not followed here.

    Raises:
        DatasetError: If `images_root` is empty or the name leads out of it.
    """
    if not images_root:
        raise DatasetError("the image folder is empty; name a folder or an s3:// prefix")
    problem = file_name_problem(file_name)
    if problem is not None:
        # What follows in a URL may be a signature, which nobody else is to see.
        shown = file_name.partition("?")[0] if "://" in file_name else file_name
        raise DatasetError(
            f"file_name {shown!r} {problem}; expected a name relative to {images_root}"
        )
    parts = file_name.split("/")
    plain = not {".", ".."} & set(parts)
    name = file_name if plain else posixpath.normpath(file_name)
    return images_root.rstrip("/") + "/" + name
