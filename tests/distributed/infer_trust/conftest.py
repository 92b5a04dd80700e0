"""One run over images with odd names from S3 and from here, by a model with hostile class names."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import tarfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from retinaray.artifact import dump_weights
from retinaray.assembly.training import make_card, read_inputs
from retinaray.cli import configure_logging
from retinaray.config.schema import InferJob, TrainJob
from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.demo.scenes import SceneSet
from retinaray.distributed.batch_inference import run_inference
from retinaray.distributed.infer_outcome import InferOutcome
from retinaray.storage import Storage

BUCKET = "retinaray-tests"
# The S3 server of these tests makes slashes of backslashes.
NAMES = [
    "a b#c=d%20%e+f?g&h.png",
    "caf\u00e9.png",
    "cafe\u0301.png",
    "\u05e9\u05dc\u05d5\u05dd.png",
    "\U0001f600 '\"`$.png",
    "line\nend\ttab.png",
    ".hidden.png",
    "-rf.png",
]
CATEGORIES = [
    *("../../escaped", "..", "a/b", "/etc/escaped", "x" * 300),
    *("line\nend", "a\\b", "s3://b/escaped", "\u05e9\u05dc\u05d5\u05dd", "$HOME `x`"),
]


@dataclass
class ProcessWatch:
    """What the process list showed of this machine.

    Attributes:
        command_lines: Of every process that was seen.
        environments: Of Ray's workers.
    """

    command_lines: set[str] = field(default_factory=set)
    environments: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Read the whole process list once."""
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                line = _read(folder / "cmdline")
                self.command_lines.add(line)
                if line.startswith("ray::"):
                    self.environments.add(_read(folder / "environ"))


@dataclass(frozen=True)
class TrustedRun:
    """A finished run, and all that was seen of it.

    Attributes:
        outcome: What the run returned.
        objects: Everything in the bucket afterwards that was not there before, by URI.
        log: What `--verbose` wrote.
        watch: What the process list showed meanwhile.
        wanted: URIs of the images that are good, in their order.
        faulty: URIs of those that are not, each with a text that its error must hold.
        new_files: Local files that appeared outside the image folder.
    """

    outcome: InferOutcome
    objects: dict[str, bytes]
    log: str
    watch: ProcessWatch
    wanted: list[str]
    faulty: dict[str, str]
    new_files: set[Path]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace").replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # It ended meanwhile, or belongs to somebody else.
        return ""


@contextmanager
def _watching() -> Iterator[ProcessWatch]:
    watch, is_over = ProcessWatch(), threading.Event()

    def keep_looking() -> None:
        while not is_over.wait(0.2):
            watch.look()

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        is_over.set()
        thread.join()


@contextmanager
def _verbose_log() -> Iterator[io.StringIO]:
    stream, ours, root = io.StringIO(), logging.getLogger("retinaray"), logging.getLogger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(ours, "level", ours.level)
        patch.setattr(root, "handlers", list(root.handlers))
        configure_logging("verbose")
        yield stream


@pytest.fixture(scope="session")
def hostile_model(
    tmp_path_factory: pytest.TempPathFactory,
    make_train_job: Callable[..., TrainJob],
    scenes: SceneSet,
) -> Path:
    """Untrained weights of a model whose classes are called like paths."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = []
    for name, original in (("train", scenes.train), ("val", scenes.val)):
        content = json.loads(original.read_bytes())
        for category, text in zip(content["categories"], CATEGORIES, strict=True):
            category["name"] = text
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(content), encoding="utf-8")
    job = make_train_job(
        folder / "tiny.pth", data__annotations=str(paths[0]), data__val_annotations=str(paths[1])
    )
    card, model = make_card(job, read_inputs(job), run_id="untrained")
    (folder / "tiny.pth").write_bytes(dump_weights(card, model.state_dict()))
    return folder / "tiny.pth"


def _pack(contents: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture(scope="session")
def trusted_run(
    ray_cluster: object,
    s3_server: EmbeddedS3,
    scenes: SceneSet,
    hostile_model: Path,
    make_infer_job: Callable[..., InferJob],
    tmp_path_factory: pytest.TempPathFactory,
) -> TrustedRun:
    """The run: a list on S3 names images on S3, images here, and tars."""
    storage = Storage(endpoint_url=s3_server.endpoint_url)
    prefix = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    local = tmp_path_factory.mktemp("odd")
    contents = [path.read_bytes() for path in sorted(scenes.images.glob("test*"))]
    wanted = []
    for folder in (f"{prefix}/in", str(local)):
        for name, content in zip(NAMES, contents, strict=False):
            storage.write_bytes(f"{folder}/{name}", content)
            wanted.append(f"{folder}/{name}")
    (local / os.fsdecode(b"Z\xfcrich.png")).write_bytes(contents[0])
    wanted.append(f"{local.as_uri()}/Z%FCrich.png")
    tar = f"{prefix}/in/a b#1.tar"
    members = {f"../../{name}": contents[0] for name in NAMES}
    storage.write_bytes(tar, _pack(members))
    (local / "no image.png").write_bytes(b"no image")
    (local / "folder.png").mkdir()
    faulty = {
        f"{prefix}/in/gone.png": "no such object",
        f"{local}/gone.png": "no such file",
        f"{local.as_uri()}/gone%FF.png": "no such file",
        f"{local.as_uri()}/a%00b.png": "NUL",
        f"{local}/no image.png": "",
        f"{local}/folder.png": "folder",
    }
    lines = [json.dumps({"uri": uri}) + "\n" for uri in [*wanted, tar, *faulty]]
    storage.write_bytes(f"{prefix}/in/all.jsonl", "".join(lines).encode())
    before = {*storage.list_files(f"s3://{BUCKET}")}
    watched = tmp_path_factory.getbasetemp()
    files_before = {*watched.rglob("*")}
    job = make_infer_job(
        f"{prefix}/out put=#1",
        model=str(hostile_model),
        images=f"{prefix}/in/all.jsonl",
        annotations=None,
        reading__endpoint_url=s3_server.endpoint_url,
        write__draw=1000,
        write__crops=True,
        part_size=8,
    )
    with _watching() as watch, _verbose_log() as log:
        outcome = run_inference(job)
    after = {*storage.list_files(f"s3://{BUCKET}")}
    return TrustedRun(
        outcome=outcome,
        objects={uri: storage.read_bytes(uri) for uri in after - before},
        log=log.getvalue(),
        watch=watch,
        wanted=[*wanted, *(f"{tar}/{name}" for name in members)],
        faulty=faulty,
        new_files={*watched.rglob("*")} - files_before,
    )


@pytest.fixture(scope="session")
def ray_logs(ray_cluster: object) -> Callable[[], dict[str, bytes]]:
    """Read what Ray itself has written about this session so far."""

    def read() -> dict[str, bytes]:
        from ray._private.worker import global_worker

        node: Any = global_worker.node
        folder = Path(node.get_session_dir_path()) / "logs"
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    return read
