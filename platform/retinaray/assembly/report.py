"""`report`: one HTML page about runs, alone or compared."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from retinaray.assembly.report_analysis import (
    AnalysedDetections,
    analyse_detections,
    make_gallery,
)
from retinaray.assembly.report_reading import open_run
from retinaray.config.report_schema import ReportJob
from retinaray.errors import DatasetError
from retinaray.reporting.report.contents import KIND_NAMES, ReportedRun
from retinaray.reporting.report.gallery import PageGallery
from retinaray.reporting.report.page import render_page
from retinaray.storage import Storage

logger = logging.getLogger(__name__)

_MAX_FAULTS = 3


@dataclass(frozen=True)
class ReportOutcome:
    """What was written.

    Attributes:
        report: The page.
        num_bytes: Its length.
        runs: Kind of each run by its name on the page.
        num_pictures: Images in the gallery.
        left_out: Why something is missing, a sentence each.
        exit_code: 0.
    """

    report: str
    num_bytes: int
    runs: dict[str, str]
    num_pictures: int
    left_out: tuple[str, ...]
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps(asdict(self))

    def to_text(self) -> str:
        """A few lines for people."""
        lines = [f"{name}: {kind}" for name, kind in self.runs.items()]
        lines += [f"  {sentence}" for sentence in self.left_out]
        size = f"{self.num_bytes / 1e6:.1f} MB, {self.num_pictures} images inside"
        return "\n".join([*lines, f"report  {self.report}  ({size})"])


def run_report(job: ReportJob) -> ReportOutcome:
    """Read runs and write the page.

    Raises:
        ConfigError: If detections come without annotations.
        DatasetError: If a place holds no run, annotations do not belong to detections, or none of
            the images that --images promises can be read.
        CheckpointError, InferenceError: If weights or candidates cannot be read or run.
        StorageError: If a file cannot be read or written.
    """
    storage = Storage(endpoint_url=job.reading.endpoint_url)
    opened = [open_run(uri, job, storage) for uri in job.runs]
    opened = [
        replace(entry, run=replace(entry.run, name=name))
        for entry, name in zip(opened, name_runs(job.runs), strict=True)
    ]
    analysed: list[tuple[str, AnalysedDetections]] = []
    runs = []
    for entry in opened:
        if entry.detections is None:
            runs.append(entry.run)
            continue
        found = analyse_detections(entry.detections, rule=job.rule)
        analysed.append((entry.run.name, found))
        runs.append(replace(entry.run, analysis=found.analysis))
    gallery, runs = _add_gallery(job, analysed, runs, storage)
    page = render_page(runs, gallery).encode()
    storage.write_bytes(job.output, page)
    return ReportOutcome(
        report=job.output,
        num_bytes=len(page),
        runs={run.name: KIND_NAMES[run.kind] for run in runs},
        num_pictures=len(gallery.pictures),
        left_out=tuple(f"{run.name}: {sentence}" for run in runs for sentence in run.gaps),
    )


def name_runs(uris: Sequence[str]) -> list[str]:
    """Short names: the last part of each place, with as many parts before it as tell them apart."""
    parts = [uri.rstrip("/").split("/") for uri in uris]
    for number in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-number:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(uris)


def _add_gallery(
    job: ReportJob,
    analysed: Sequence[tuple[str, AnalysedDetections]],
    runs: list[ReportedRun],
    storage: Storage,
) -> tuple[PageGallery, list[ReportedRun]]:
    """The gallery, and the runs with the reasons why images are missing there."""
    if job.gallery == 0 or not analysed:
        return PageGallery(), runs
    located = [pair for pair in analysed if pair[1].source.images_root or pair[1].source.uris]
    reasons = {
        name: "images: nobody says where they are; give --images"
        for name, found in analysed
        if not (found.source.images_root or found.source.uris)
    }
    gallery = PageGallery()
    if located:
        gallery, faults = make_gallery(located, job, storage.read_bytes)
        if faults and not gallery.pictures and job.images is not None:
            raise DatasetError(
                f"none of {len(faults)} images could be read, the first: {faults[0]}; check "
                f"--images {job.images}"
            )
        if faults:
            more = f", and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
            text = f"{'; '.join(faults[:_MAX_FAULTS])}{more}"
            logger.warning("%d images could not be read: %s", len(faults), text)
            reasons[located[0][0]] = f"images: {len(faults)} could not be read: {text}"
    return gallery, [
        run.with_gap(reasons[run.name]) if run.name in reasons else run for run in runs
    ]
