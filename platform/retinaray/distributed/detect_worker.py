"""One worker of a batch inference: an engine that takes parts, and commits them itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from retinaray.assembly.reading import read_model_file
from retinaray.assembly.run_plan import (
    detect_part,
    load_as_used,
    make_infer_settings,
    make_pictures,
)
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import InferJob
from retinaray.errors import RetinarayError
from retinaray.inference.output_formats import OutputSettings
from retinaray.inference.part_attempts import PartAttempts, refuse_given_up
from retinaray.inference.part_table import read_part
from retinaray.inference.pipeline import ImageSource
from retinaray.inference.predictor import load_predictor
from retinaray.inference.run_files import PartReceipt, RunFiles
from retinaray.inference.source_reading import make_source_reader
from retinaray.storage import Storage

logger = logging.getLogger(__name__)

RECEIPT_SCHEMA = pa.schema(
    [
        ("part", pa.int64()),
        ("num_images", pa.int64()),
        ("num_errors", pa.int64()),
        ("num_detections", pa.int64()),
        ("failure", pa.string()),
    ]
)


class DetectWorker:
    """Loads the model once, then processes one part per call.

    Args:
        job: A resolved InferJob as plain values.
        backend: Chosen runtime.
        root: Folder or S3 prefix of the run.
        output: What the run writes.
        draw_limit: Of the hashes of the images that are drawn.
        threads: Processor threads of the engine.
        done: Parts that are committed already.
    """

    def __init__(
        self,
        *,
        job: Mapping[str, Any],
        backend: str,
        root: str,
        output: OutputSettings,
        draw_limit: int,
        threads: int,
        done: frozenset[int],
    ) -> None:
        # Ray sets one OpenMP thread per reserved CPU, whatever the engine is meant to use.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        settings = load_from_dict(InferJob, dict(job))
        self._job = settings
        self._storage = Storage(endpoint_url=settings.reading.endpoint_url)
        self._files = RunFiles(root, self._storage, output)
        self._draw_limit = draw_limit
        self._done = done
        content, sidecar = read_model_file(settings.model, self._storage.read_bytes)
        self._predictor, _ = load_predictor(
            content,
            uri=settings.model,
            sidecar=sidecar,
            backend=backend,
            settings=make_infer_settings(settings, threads=threads),
        )

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Process the parts in some rows; parts that are committed already give no receipt.

        A part that could not be committed gives a receipt with the failure in words: of exceptions
        that leave a worker, Ray Data tells the driver nothing as long as the others go on.
        """
        receipts = [
            self._attempt(row["part"], read_part(row))
            for row in rows.to_pylist()
            if row["part"] not in self._done
        ]
        return pa.Table.from_pylist(receipts, RECEIPT_SCHEMA)

    def _attempt(self, number: int, sources: list[ImageSource]) -> dict[str, Any]:
        try:
            return {**vars(self._process(number, sources)), "failure": ""}
        # RuntimeError is what torch, OpenVINO and CUDA raise.
        except (RetinarayError, RuntimeError) as error:
            logger.exception("part %d failed", number)
            nothing = PartReceipt(number, num_images=0, num_errors=0, num_detections=0)
            return {**vars(nothing), "failure": str(error) or type(error).__name__}

    def _process(self, number: int, sources: list[ImageSource]) -> PartReceipt:
        stored = make_source_reader(sources, self._storage)
        attempts = PartAttempts(self._files.root, number, self._storage)
        given_up = attempts.begin()
        if attempts.is_suspicious:
            logger.warning("part %d ended its workers before: reading its images singly", number)
            attempts.probe(
                sources,
                lambda source: load_as_used(source, self._job, self._predictor.canvas, stored),
                given_up,
            )
        read = refuse_given_up(stored, [sources[index] for index in given_up])
        pictures = make_pictures(
            self._job, self._files, self._predictor.card, read, limit=self._draw_limit
        )
        results = detect_part(self._predictor, sources, self._job, read=read)
        receipt = self._files.commit(number, pictures.follow(results))
        attempts.end()
        return receipt
