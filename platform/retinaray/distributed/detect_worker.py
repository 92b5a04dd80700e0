"""One worker of a batch inference: an engine that takes parts, and commits them itself."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from retinaray.assembly.reading import (
    make_predictor_settings,
    make_read_settings,
    read_model_file,
)
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import InferJob
from retinaray.errors import RetinarayError
from retinaray.inference.part_attempts import PartAttempts, refuse_given_up
from retinaray.inference.pipeline import ImageSource, detect_images, load_canvas
from retinaray.inference.predictor import load_predictor
from retinaray.inference.run_files import PartReceipt, RunFiles
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
        threads: Processor threads of the engine.
        done: Parts that are committed already.
    """

    def __init__(
        self,
        *,
        job: Mapping[str, Any],
        backend: str,
        root: str,
        threads: int,
        done: frozenset[int],
    ) -> None:
        # Ray sets one OpenMP thread per reserved CPU, whatever the engine is meant to use.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        settings = load_from_dict(InferJob, dict(job))
        self._job = settings
        self._storage = Storage(endpoint_url=settings.reading.endpoint_url)
        self._files = RunFiles(root, self._storage)
        self._done = done
        content, sidecar = read_model_file(settings.model, settings.reading)
        self._predictor, _ = load_predictor(
            content,
            uri=settings.model,
            sidecar=sidecar,
            backend=backend,
            settings=make_predictor_settings(
                settings.detection, batch=settings.batch, threads=threads
            ),
        )

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Process the parts in some rows; parts that are committed already give no receipt.

        A part that could not be committed gives a receipt with the failure in words: of exceptions
        that leave a worker, Ray Data tells the driver nothing as long as the others go on.
        """
        receipts = [
            self._attempt(row["part"], row["image_ids"], row["uris"])
            for row in rows.to_pylist()
            if row["part"] not in self._done
        ]
        return pa.Table.from_pylist(receipts, RECEIPT_SCHEMA)

    def _attempt(self, number: int, image_ids: list[str], uris: list[str]) -> dict[str, Any]:
        try:
            return {**vars(self._process(number, image_ids, uris)), "failure": ""}
        # RuntimeError is what torch, OpenVINO and CUDA raise.
        except (RetinarayError, RuntimeError) as error:
            logger.exception("part %d failed", number)
            nothing = PartReceipt(number, num_images=0, num_errors=0, num_detections=0)
            return {**vars(nothing), "failure": str(error) or type(error).__name__}

    def _process(self, number: int, image_ids: list[str], uris: list[str]) -> PartReceipt:
        sources = [
            ImageSource(json.loads(image_id), uri)
            for image_id, uri in zip(image_ids, uris, strict=True)
        ]
        settings = make_read_settings(self._job.reading)
        attempts = PartAttempts(self._files.root, number, self._storage)
        given_up = attempts.begin()
        if attempts.is_suspicious:
            logger.warning("part %d ended its workers before: reading its images singly", number)

            def load(source: ImageSource) -> object:
                return load_canvas(
                    source, self._predictor.canvas, self._storage.read_bytes, settings
                )

            attempts.probe(sources, load, given_up)
        results = detect_images(
            self._predictor,
            sources,
            read=refuse_given_up(self._storage.read_bytes, [sources[i] for i in given_up]),
            batch=self._job.batch,
            settings=settings,
        )
        receipt = self._files.commit(number, results)
        attempts.end()
        return receipt
