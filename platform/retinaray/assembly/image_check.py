"""Before a training: are the images where its settings say? A few are asked for, none is read."""

from __future__ import annotations

from retinaray.assembly.training import TrainingInputs
from retinaray.config.schema import TrainJob
from retinaray.data.coco import CocoDataset, resolve_image_uri
from retinaray.errors import DatasetError, UnreadableFileError
from retinaray.path_hints import hint_at_image
from retinaray.storage import Storage, is_s3, local_path


def check_images(job: TrainJob, inputs: TrainingInputs) -> None:
    """Refuse a training whose images lie elsewhere, before a worker finds out.

    Of both sets the first, the middle and the last image are looked for: three requests each on S3.

    Raises:
        DatasetError: If none of the three is there.
        StorageError: If the place cannot be reached.
    """
    storage = Storage(endpoint_url=job.reading.endpoint_url)
    _look(storage, inputs.train, job.data.images, "--images")
    if inputs.val is not None:
        _look(storage, inputs.val, job.data.val_images or job.data.images, "--val-images")


def _look(storage: Storage, dataset: CocoDataset, root: str, option: str) -> None:
    last = len(dataset) - 1
    names = [dataset.images[position].file_name for position in sorted({0, last // 2, last})]
    if any(_is_there(storage, resolve_image_uri(root, name)) for name in names):
        return
    hint = "" if is_s3(root) else hint_at_image(local_path(root), names[0])
    raise DatasetError(
        f"{resolve_image_uri(root, names[0])}: no such image ({len(names)} were looked for, none "
        f"is there); {option} is the folder in which the file names of {dataset.source} begin"
        + (f"; {hint}" if hint else "")
    )


def _is_there(storage: Storage, uri: str) -> bool:
    try:
        storage.size(uri)
    except UnreadableFileError:
        return False
    return True
