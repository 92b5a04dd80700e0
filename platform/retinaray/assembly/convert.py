"""`convert`: labels from one format to another, whole or not at all, with what was lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from retinaray.config.convert_schema import ConvertJob
from retinaray.config.yaml_files import parse_yaml, write_yaml
from retinaray.errors import DatasetError
from retinaray.interchange.coco_labels import read_coco, read_coco_results, write_coco
from retinaray.interchange.formats import FORMATS, settle_difficult, without_outsiders
from retinaray.interchange.kitti import read_kitti, write_kitti
from retinaray.interchange.known_images import KnownImages, find_images, without_boxes
from retinaray.interchange.label_files import CLASS_FILE, read_class_lines, read_label_text
from retinaray.interchange.label_studio import write_label_studio
from retinaray.interchange.labelled_set import LabelledSet, list_losses, with_references
from retinaray.interchange.labelme_json import read_labelme, write_labelme
from retinaray.interchange.open_images import read_open_images, write_open_images
from retinaray.interchange.output_folder import refuse_existing, write_folder
from retinaray.interchange.voc import read_voc, write_voc
from retinaray.interchange.yolo import read_yolo, read_yolo_names, write_yolo
from retinaray.local_files import write_local

_CLASS_FILES = (CLASS_FILE, "obj.names", "data.yaml", "data.yml")


@dataclass(frozen=True)
class ConvertOutcome:
    """What was converted.

    Attributes:
        output: File or folder that was written.
        num_images: Images in it.
        num_boxes: Boxes that the source had, those counted in `losses` included.
        names: Classes in their order.
        notes: What was left out or changed while reading: sentence to number of cases.
        losses: What the written format does not hold: sentence to number of cases.
    """

    output: str
    num_images: int
    num_boxes: int
    names: tuple[str, ...]
    notes: Mapping[str, int]
    losses: Mapping[str, int]

    exit_code = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps(
            {
                "output": self.output,
                "images": self.num_images,
                "boxes": self.num_boxes,
                "classes": list(self.names),
                "notes": dict(self.notes),
                "losses": dict(self.losses),
            },
            ensure_ascii=False,
        )

    def to_text(self) -> str:
        """A table for people."""
        lines = [
            f"{self.output}: {self.num_images} images, {self.num_boxes} boxes, "
            f"{len(self.names)} classes"
        ]
        for title, entries in (("read", self.notes), ("written", self.losses)):
            lines += [f"  {title:<8} {count:>8}  {text}" for text, count in entries.items()]
        return "\n".join(lines)


def run_convert(job: ConvertJob) -> ConvertOutcome:
    """Read labels, and write them in another format.

    Raises:
        DatasetError: If labels cannot be read, with file and line, or the output exists.
        StorageError: If the output cannot be written.
    """
    output = Path(job.output)
    refuse_existing(output, may_be_empty_folder=job.target_format != "coco")
    reference = None if job.reference is None else read_coco(Path(job.reference))
    labels = without_outsiders(_read_labels(job, reference))
    labels = settle_difficult(labels, job.difficult)
    if reference is not None:
        labels = with_references(labels, reference, job.source)
    if job.target_format == "coco":
        write_local(str(output), write_coco(labels).encode(), only_if_absent=True)
    else:
        write_folder(output, _write_labels(job, labels))
    return ConvertOutcome(
        output=job.output,
        num_images=len(labels.images),
        num_boxes=sum(1 for _ in labels.boxes),
        names=labels.names,
        notes=labels.notes,
        losses=list_losses(labels, FORMATS[job.target_format]),
    )


def _read_labels(job: ConvertJob, reference: LabelledSet | None) -> LabelledSet:
    source = Path(job.source)
    if not source.exists():
        raise DatasetError(f"{source}: expected labels to read, found nothing; check the path")
    if job.source_format == "coco":
        return read_coco(source)
    if job.source_format == "coco-results":
        if reference is None:
            raise ValueError("coco-results without a reference")
        return read_coco_results(source, reference)
    if not source.is_dir() and job.source_format != "open-images":
        raise DatasetError(
            f"{source}: expected a folder of {job.source_format} labels, found a file; give the "
            "folder that it is in, or another --from"
        )
    names = _read_names(job, source, reference)
    if job.source_format == "labelme":
        return read_labelme(source, names=names)
    known = _list_images(job, reference)
    if job.source_format == "voc":
        sizes = {image.file_name: (image.height, image.width) for image in known.images}
        return read_voc(source, names=names, sizes=sizes, origin=job.voc_origin)
    return _read_sizeless(job.source_format, source, names, known)


def _read_sizeless(
    source_format: str, source: Path, names: tuple[str, ...] | None, known: KnownImages
) -> LabelledSet:
    if source_format == "kitti":
        return read_kitti(source, names=names, known=known)
    if source_format == "open-images":
        return read_open_images(source, names=names, known=known)
    if names is None:
        raise DatasetError(
            f"{source}: expected the class names in {', '.join(_CLASS_FILES)} beside the labels, "
            "found none; give --class-names FILE"
        )
    return read_yolo(source, names=names, known=known)


def _list_images(job: ConvertJob, reference: LabelledSet | None) -> KnownImages:
    if reference is not None:
        return without_boxes(reference.images, str(job.reference))
    if job.images is not None:
        return find_images(Path(job.images), num_threads=job.threads)
    return KnownImages((), "")


def _read_names(
    job: ConvertJob, source: Path, reference: LabelledSet | None
) -> tuple[str, ...] | None:
    if job.class_names is not None:
        return _read_class_file(Path(job.class_names))
    if reference is not None:
        return reference.names
    folder = source if source.is_dir() else source.parent
    for path in _candidate_class_files(folder):
        if path.is_file():
            return _read_class_file(path)
    return None


def _candidate_class_files(folder: Path) -> Iterator[Path]:
    # Class names lie beside labels/, which may have a folder per split.
    parts = folder.parts[-2:]
    above = list(folder.parents)[: len(parts) - parts.index("labels")] if "labels" in parts else []
    for place in (folder, *above):
        for name in _CLASS_FILES:
            yield place / name


def _read_class_file(path: Path) -> tuple[str, ...]:
    if path.suffix.lower() not in (".yaml", ".yml"):
        return read_class_lines(path)
    content = parse_yaml(read_label_text(path), str(path))
    # Numbers as keys are faults in a job file, and right here.
    faults = [fault for fault in content.faults if "given twice" in fault]
    if faults or not content.is_readable:
        raise DatasetError((faults or content.faults)[0])
    return read_yolo_names(content.tree, str(path))


def _write_labels(job: ConvertJob, labels: LabelledSet) -> Iterable[tuple[str, str]]:
    source = job.source
    if job.target_format == "voc":
        return write_voc(labels, origin=job.voc_origin, source=source)
    if job.target_format == "kitti":
        return write_kitti(labels, source=source)
    if job.target_format == "open-images":
        return write_open_images(labels, source=source)
    if job.target_format == "labelme":
        return write_labelme(labels, source=source)
    if job.target_format == "label-studio":
        return write_label_studio(labels, image_prefix=job.image_prefix)
    return _write_yolo(labels, source)


def _write_yolo(labels: LabelledSet, source: str) -> Iterator[tuple[str, str]]:
    yield from write_yolo(labels, source=source)
    tree = {"train": "images", "val": "images", "names": dict(enumerate(labels.names))}
    yield "data.yaml", write_yaml(tree)
