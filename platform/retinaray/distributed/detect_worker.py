"""One worker of a batch inference: an engine that takes parts, and commits them itself."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
from retinaray.distributed.infer_metrics import InferMetrics
from retinaray.distributed.part_loading import open_loader
from retinaray.errors import RetinarayError
from retinaray.inference.output_formats import OutputSettings
from retinaray.inference.part_attempts import PartAttempts, refuse_given_up
from retinaray.inference.part_table import read_part
from retinaray.inference.part_turns import PartTurns
from retinaray.inference.pipeline import ImageResult, ImageSource
from retinaray.inference.predictor import load_predictor
from retinaray.inference.run_files import PartReceipt, RunFiles
from retinaray.inference.run_pace import PartReport
from retinaray.inference.shared_predictor import share_predictor
from retinaray.inference.source_reading import make_source_reader
from retinaray.inference.stage_times import STAGE_FIELDS, StageClock
from retinaray.log_format import start_worker_log
from retinaray.storage import Storage

logger = logging.getLogger(__name__)

RECEIPT_SCHEMA = pa.schema(
    [
        ("part", pa.int64()),
        ("num_images", pa.int64()),
        ("num_errors", pa.int64()),
        ("num_detections", pa.int64()),
        ("worker", pa.string()),
        ("began", pa.float64()),
        ("ended", pa.float64()),
        *((name, pa.int64() if name.startswith("num_") else pa.float64()) for name in STAGE_FIELDS),
        ("failure", pa.string()),
    ]
)


class DetectWorker:
    """Loads the model once, then processes one part per call; calls may come from several threads.

    Args:
        job: A resolved InferJob as plain values.
        record: Of the run: its run_id, its backend, draw_limit, of the hashes of the images that
            are drawn, and log, how workers log.
        root: Folder or S3 prefix of the run.
        output: What the run writes.
        threads: Processor threads of the engine.
        num_decode_tasks: Tasks that decode for one part at once, where the job has processors for
            that.
        done: Parts that are committed already.
    """

    def __init__(
        self,
        *,
        job: Mapping[str, Any],
        record: Mapping[str, Any],
        root: str,
        output: OutputSettings,
        threads: int,
        num_decode_tasks: int,
        done: frozenset[int],
    ) -> None:
        # Ray sets one OpenMP thread per reserved CPU, whatever the engine is meant to use.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        settings = load_from_dict(InferJob, dict(job))
        self._job = settings
        self._storage = Storage(endpoint_url=settings.reading.endpoint_url)
        self._files = RunFiles(root, self._storage, output)
        self._draw_limit: int = record["draw_limit"]
        self._num_decode_tasks = num_decode_tasks
        self._run_id: str = record["run_id"]
        self._done = done
        content, sidecar = read_model_file(settings.model, self._storage.read_bytes)
        predictor, _ = load_predictor(
            content,
            uri=settings.model,
            sidecar=sidecar,
            backend=record["backend"],
            settings=make_infer_settings(settings, threads=threads),
        )
        self._predictor = share_predictor(predictor)
        self._turns = PartTurns()
        self._metrics = InferMetrics(self._run_id, record["backend"])
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        start_worker_log(record.get("log"), run_id=self._run_id, worker=self._name)

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
        began, clock, failure = time.time(), StageClock(), ""
        receipt = PartReceipt(number, num_images=0, num_errors=0, num_detections=0)
        try:
            receipt = self._process(number, sources, clock)
        # RuntimeError is what torch, OpenVINO and CUDA raise.
        except (RetinarayError, RuntimeError) as error:
            logger.exception("part %d failed", number)
            failure = str(error) or type(error).__name__
        # The engine's seconds are those since the last receipt that counted, whatever part had it.
        engine_s = 0.0 if failure else self._predictor.take_busy_s()
        row = {
            **vars(receipt),
            **vars(replace(clock.times, engine_s=engine_s)),
            "worker": self._name,
            "began": began,
            "ended": time.time(),
            "failure": failure,
        }
        if not failure:
            self._metrics.count(PartReport.from_row(row))
        return row

    def _process(self, number: int, sources: list[ImageSource], clock: StageClock) -> PartReceipt:
        stored = make_source_reader(
            sources, self._storage, max_bytes=self._job.reading.max_file_bytes
        )
        attempts = PartAttempts(self._files.root, number, self._storage)
        given_up = attempts.begin()
        if attempts.is_suspicious:
            logger.warning("part %d ended its workers before: reading its images singly", number)
            with self._turns.alone():
                attempts.probe(
                    sources,
                    lambda source: load_as_used(source, self._job, self._predictor.canvas, stored),
                    given_up,
                )
        read = refuse_given_up(stored, [sources[index] for index in given_up])
        pictures = make_pictures(
            self._job, self._files, self._predictor.card, read, limit=self._draw_limit
        )
        with (
            self._turns.shared(),
            open_loader(
                self._job, self._predictor.canvas, read, clock, num_tasks=self._num_decode_tasks
            ) as canvases,
            clock.measure("commit"),
        ):
            results = detect_part(
                self._predictor,
                sources,
                self._job,
                read=read,
                loader=canvases.loader,
                ahead=canvases.ahead,
                clock=clock,
            )
            receipt = self._files.commit(
                number,
                _exclude(pictures.follow(results), clock),
                run_id=self._run_id,
                is_first=attempts.is_first,
            )
        attempts.end()
        return receipt


def _exclude(results: Iterator[ImageResult], clock: StageClock) -> Iterator[ImageResult]:
    """The same results, of which the making does not count as committing."""
    while True:
        start = time.perf_counter()
        result = next(results, None)
        clock.count("commit", start - time.perf_counter())
        if result is None:
            return
        yield result
