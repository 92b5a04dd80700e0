"""`plan`: its arithmetic against torch's own account, the real sampler, the real cut, the rules."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from retinaray import cli
from retinaray.assembly import job_plan_training
from retinaray.assembly import job_plan_workers as rules
from retinaray.assembly.job_plan import PlanOutcome, run_plan
from retinaray.assembly.job_plan_files import (
    count_parts,
    inspect_inference_files,
    inspect_training_files,
)
from retinaray.assembly.job_plan_inference import count_requests
from retinaray.assembly.job_plan_memory import (
    StepShape,
    TrainingMemory,
    measure_inference,
    measure_training,
)
from retinaray.assembly.job_plan_nodes import describe_this_machine, resolve_nodes
from retinaray.assembly.job_plan_room import check_gpu_room, check_host_room
from retinaray.assembly.training import count_steps, make_card, make_loader, read_inputs
from retinaray.assembly.training_inputs import choose_training_canvas
from retinaray.config.loading import load_from_argv, load_from_dict, to_dict, to_yaml
from retinaray.config.plan_schema import PlanJob, parse_nodes
from retinaray.config.schema import InferJob, TrainJob, TuneJob
from retinaray.data.batching import Batch
from retinaray.detector.retinanet import RetinaNet
from retinaray.inference.image_sources import ImageSource
from retinaray.inference.manifest import cut_parts
from retinaray.reporting.plan_table import PlanSheet
from retinaray.storage import Storage
from retinaray.training.state import TrainingState
from retinaray.training.step import LossSettings, WeightAverage, make_optimizer, take_step

MIB = 1 << 20
GIB = 1 << 30
BIG_NODE = "(cpu=64,mem=512GiB)"


@pytest.fixture
def plan_job(tmp_path: Path) -> Callable[..., PlanOutcome]:
    """Plan a job: plan_job(job or settings as YAML, "--nodes", ...)."""

    def plan(settings: Any, *argv: str) -> PlanOutcome:
        path = tmp_path / "job.yaml"
        path.write_text(settings if isinstance(settings, str) else to_yaml(settings))
        return run_plan(load_from_argv(PlanJob, ["--job", str(path), *argv]))

    return plan


def figures_of(outcome: PlanOutcome) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = json.loads(outcome.to_json())["figures"]
    return figures


def make_batch(shape: StepShape) -> Batch:
    count, boxes = shape.batch, shape.num_boxes
    return Batch(
        images=torch.zeros(count, 3, *shape.canvas, dtype=torch.uint8),
        boxes_xyxy=torch.zeros(count, boxes, 4),
        class_indices=torch.zeros(count, boxes, dtype=torch.int64),
        is_valid=torch.ones(count, boxes, dtype=torch.bool),
        is_crowd=torch.zeros(count, boxes, dtype=torch.bool),
        image_ids=(),
    )


class RealTraining:
    """The same steps with real tensors."""

    def __init__(self, network: RetinaNet, shape: StepShape, kind: str) -> None:
        self.network = network.train()
        self.optimizer = make_optimizer(network, kind=kind, learning_rate=1e-3, weight_decay=0.0)
        self.average = WeightAverage(network, decay=0.9) if kind == "adamw" else None
        self._dtype = shape.autocast_dtype
        self._batch = make_batch(shape)
        self._anchors = network.anchors_for(self._batch.images)

    def step(self) -> None:
        take_step(
            self.network,
            self.optimizer,
            self._batch,
            anchors_xyxy=self._anchors,
            settings=LossSettings(),
            learning_rate=1e-3,
            clip_norm=1.0,
            autocast_dtype=self._dtype,
        )
        if self.average is not None:
            self.average.update(self.network, 0)

    def count_saved(self) -> int:
        """Bytes that the forward pass keeps, without parameters."""
        owned = {t.untyped_storage().data_ptr() for t in self.network.state_dict().values()}
        sizes: dict[int, int] = {}
        kept = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                sizes[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor.detach())
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            self.step()
        return sum(sizes.values())


def find_peak(work: Callable[[], object]) -> int:
    """Most bytes held while something runs, by torch's own account of its allocator.

    It forgets what was there before: everything has to be made inside.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()
    assert kept is not None
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


make_gn = partial(
    RetinaNet, backbone="ResNet10FPN", num_classes=3, norm="gn", fpn_channels=32, head_depth=1
)
make_frozen = partial(make_gn, norm="frozen_bn")


@cache
def measure(make: Callable[[], RetinaNet], shape: StepShape, kind: str) -> TrainingMemory:
    """What is planned; a step without content takes seconds."""
    return measure_training(
        make, shape, optimizer=kind, has_average=kind == "adamw", loss=LossSettings()
    )


# Large enough that the activations, not the optimizer's own temporaries, make the peak.
GN_SHAPE = StepShape(3, (192, 256), 5, torch.bfloat16, is_on_gpu=False)


@pytest.mark.parametrize(
    ("make", "shape", "kind"),
    [
        (make_gn, GN_SHAPE, "sgd"),
        (make_frozen, StepShape(3, (192, 256), 5, None, is_on_gpu=False), "adamw"),
    ],
    ids=["gn, bfloat16, sgd", "frozen_bn, float32, adamw and average"],
)
@pytest.mark.usefixtures("one_thread")
def test_measure_training_agrees_with_a_real_step(
    make: Callable[[], RetinaNet], shape: StepShape, kind: str
) -> None:
    planned = measure(make, shape, kind)
    real = RealTraining(make(), shape, kind)
    trainable = [p for p in real.network.parameters() if p.requires_grad]
    assert planned.gradients == 4 * sum(p.numel() for p in trainable)
    assert planned.weights == sum(t.nbytes for t in real.network.state_dict().values())
    assert planned.saved == pytest.approx(real.count_saved(), rel=0.01)
    assert planned.saved > planned.weights
    if kind == "adamw":
        # Two moments for each, and AdamW's counter of steps.
        assert planned.optimizer == 2 * planned.gradients + 4 * len(trainable)
        assert planned.average == planned.weights
    else:
        assert (planned.optimizer, planned.average) == (planned.gradients, 0)
    written = len(TrainingState(real.network, real.optimizer, real.average).dump())
    # The rest is names and the zip around them; the weights are written a second time.
    assert planned.checkpoint - planned.weights == pytest.approx(written, rel=0.01)

    def train() -> RealTraining:
        again = RealTraining(make(), shape, kind)
        again.step()
        again.step()
        return again

    # What the plan cannot know: a processor's bfloat16 convolutions have a workspace, its others
    # give the gradient of a weight in another layout, which is copied.
    assert planned.peak == pytest.approx(find_peak(train), rel=0.07)


def test_measure_training_keeps_norms_in_float32_on_gpus() -> None:
    on_cpu = measure(make_gn, GN_SHAPE, "sgd")
    on_gpu = measure(make_gn, replace(GN_SHAPE, is_on_gpu=True), "sgd")
    # Activations are kept in both types then: more than half as much again.
    assert 1.3 < on_gpu.saved / on_cpu.saved < 3
    assert (on_gpu.weights, on_gpu.optimizer) == (on_cpu.weights, on_cpu.optimizer)


@pytest.mark.usefixtures("one_thread")
def test_measure_inference_agrees_with_a_real_call() -> None:
    planned = measure_inference(make_gn, batch=4, canvas=(256, 256))

    def predict() -> RetinaNet:
        network = make_gn().eval()
        with torch.no_grad():
            network(torch.zeros(4, 3, 256, 256, dtype=torch.uint8))
        return network

    network = make_gn()
    assert planned.weights == sum(p.nbytes for p in (*network.parameters(), *network.buffers()))
    assert planned.peak == pytest.approx(find_peak(predict), rel=0.03)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepShape, dict[str, Any]]]:
    """What is asked of `measure_training`, which answers at once: 400 MiB of weights."""
    asked: list[tuple[StepShape, dict[str, Any]]] = []

    def answer(_: object, shape: StepShape, **options: Any) -> TrainingMemory:
        asked.append((shape, options))
        return TrainingMemory(
            weights=400 * MIB,
            gradients=400 * MIB,
            optimizer=800 * MIB,
            average=400 * MIB,
            saved=3 * GIB,
            peak=6 * GIB,
        )

    monkeypatch.setattr(job_plan_training, "measure_training", answer)
    return asked


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.norm": "bn", "anchors.levels": "2-7", "model.fpn_channels": 32},
        {"model.head_norm": "gn", "model.head_depth": 2},
        {"model.backbone": "ResNet50FPN", "model.stride_in_1x1": True, "model.head_depth": 2},
    ],
)
def test_make_network_is_that_of_the_training(
    make_train_job: Callable[..., TrainJob], changes: dict[str, object]
) -> None:
    job = make_train_job(changes)
    with torch.device("meta"):
        planned = job_plan_training.make_network(job, 2)
    _, real = make_card(job, read_inputs(job), run_id="r")
    assert {key: value.shape for key, value in planned.state_dict().items()} == {
        key: value.shape for key, value in real.state_dict().items()
    }


@pytest.mark.parametrize("num_images", [1, 16, 17, 1024, 1040, 70_656, 70_657, 99_999, 250_001])
@pytest.mark.parametrize("part_size", [None, 7, 1000])
def test_count_parts_is_that_of_the_cut(num_images: int, part_size: int | None) -> None:
    image = ImageSource(0, "")
    cut = cut_parts(itertools.repeat(image, num_images), part_size)
    assert count_parts(num_images, part_size) == sum(1 for _ in cut)


def test_count_requests_gives_the_rows_of_the_scaling_sheet() -> None:
    sheet = (Path(__file__).parents[3] / "cluster" / "README.md").read_text("utf-8")
    for images, parts in ((10_000, 148), (1_000_000, 1_314), (1_000_000_000, 1_000_314)):
        assert count_parts(images, None) == parts
        counts = count_requests(images, parts, images_on_s3=True, run_on_s3=True, is_merged=False)
        manifest_files = -(-parts // 500)
        cells = (
            images,
            parts,
            counts["GET"],
            counts["PUT"] - manifest_files,
            counts["DELETE"],
            counts["LIST"],
        )
        assert f"| {' | '.join(f'{cell:,}' for cell in cells)} | {manifest_files:,} file" in sheet
    merged = count_requests(100, 7, images_on_s3=True, run_on_s3=True, is_merged=True)
    assert merged == {"GET": 100 + 21, "PUT": 15, "LIST": 1, "DELETE": 7}
    local = count_requests(100, 7, images_on_s3=False, run_on_s3=False, is_merged=True)
    assert set(local.values()) == {0}


def fill_bucket(place: str, names: list[str]) -> None:
    """Write files of 100, 200, ... bytes."""
    for number, name in enumerate(names, 1):
        Storage().write_bytes(f"{place}/{name}", b"x" * 100 * number)


def test_inspect_training_files_compares_a_listing_with_the_annotations(
    make_train_job: Callable[..., TrainJob], s3_bucket: str
) -> None:
    dataset = read_inputs(make_train_job()).train
    fill_bucket(s3_bucket, ["1.png", "2.png", "4.png", "7.png"])
    inspect = partial(inspect_training_files, dataset, s3_bucket, Storage(), image_bytes=9)
    whole = inspect(limit=4)
    # Images 1, 2 and 4 of six, of 100, 200 and 300 bytes.
    assert (whole.num_files, whole.mean_bytes, whole.largest_bytes) == (6, 200.0, 300)
    assert whole.num_absent == 3
    assert whole.absent == tuple(f"{s3_bucket}/{number}.png" for number in (3, 5, 6))
    # Behind the end of a listing that was cut off everything may be there.
    cut_off = inspect(limit=2)
    assert (cut_off.num_absent, cut_off.mean_bytes) == (0, 150.0)


def test_inspect_inference_files_lists_a_prefix_up_to_the_limit(s3_bucket: str) -> None:
    fill_bucket(s3_bucket, ["a.jpg", "b.txt", "c.jpg", "d.jpg"])
    job = InferJob(model="m.onnx", images=f"{s3_bucket}/")
    inspect = partial(inspect_inference_files, job, Storage(), image_bytes=9)
    # a, c and d are images, of 100, 300 and 400 bytes.
    assert astuple(inspect(num_images=None, limit=3))[:5] == (3, 800 / 3, 400, False, False)
    assert astuple(inspect(num_images=None, limit=2))[:5] == (2, 200.0, 300, False, True)
    assert astuple(inspect(num_images=7, limit=2))[:5] == (7, 9.0, 9, True, False)


@pytest.mark.parametrize(("search", "expected"), [("grid", 6), ("random", 10)])
def test_count_trials_multiplies_the_choices_of_a_grid(
    make_train_job: Callable[..., TrainJob], image_set: Any, search: str, expected: int
) -> None:
    tree = to_dict(make_train_job({"data.val_annotations": str(image_set.annotations)}))
    tree["space"] = {"run.batch": [4, 8], "optim.peak_lr": [0.1, 0.2, 0.3]}
    job = load_from_dict(TuneJob, {**tree, "sweep": {"search": search, "trials": 10}})
    assert job_plan_training.count_trials(job) == expected


def test_count_threads_shares_the_machine_among_its_gpus() -> None:
    # Planned before an autoscaler brought the machine; 48 processors and 4 GPUs are there.
    assert rules.count_threads(1, num_cpus=48, num_gpus=4) == 12
    assert rules.count_threads(16, num_cpus=48, num_gpus=4) == 16
    assert rules.count_threads(2, num_cpus=48, num_gpus=0) == 2


def test_count_loaders_fills_the_cores_beside_a_gpu() -> None:
    assert rules.count_loaders(None, num_threads=12, has_gpu=True) == 11
    assert rules.count_loaders(None, num_threads=1, has_gpu=True) == 1
    assert rules.count_loaders(None, num_threads=96, has_gpu=True) == 16
    assert rules.count_loaders(None, num_threads=12, has_gpu=False) == 0
    assert rules.count_loaders(3, num_threads=12, has_gpu=False) == 3


def test_resolve_nodes_knows_types_and_lists_them_for_others() -> None:
    requests = parse_nodes(
        "2xg5.12xlarge,4xc7i.4xlarge,m6i.xlarge,(cpu=8,mem=32GiB),3xq1.xlarge,c7i.xlarge"
    )
    nodes, unknown = resolve_nodes(requests)
    have = [(n.count, n.num_cpus, n.num_gpus, n.memory_bytes / GIB) for n in nodes]
    assert have == [(2, 48, 4, 192), (4, 16, 0, 32), (1, 4, 0, 16), (1, 8, 0, 32), (1, 4, 0, 8)]
    assert [n.gpu_memory_bytes / GIB for n in nodes] == [24, 0, 0, 0, 0]
    (line,) = unknown
    assert "'q1.xlarge'" in line
    assert "3x(cpu=..,gpu=..,mem=..GiB,gpu_mem=..GiB); known are g4dn, g5, " in line


def test_describe_this_machine_agrees_with_the_system() -> None:
    node = describe_this_machine()
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    (total_kib,) = (int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
    assert 0 < node.memory_bytes <= total_kib * 1024
    assert node.num_gpus == torch.cuda.device_count()
    assert node.num_cpus >= 1


def test_add_up_gives_a_cluster_of_its_own_at_least_the_processors_that_it_starts_with() -> None:
    nodes, _ = resolve_nodes(parse_nodes("2xg5.xlarge,(cpu=2,mem=4GiB)"))
    there = rules.add_up(nodes, is_local=False, min_cpus=99)
    assert (there.num_cpus, there.num_gpus, there.num_nodes) == (10, 2, 3)
    assert rules.add_up(nodes, is_local=True, min_cpus=99).num_cpus == 99


@pytest.mark.parametrize(
    ("num_gpus", "num_processes", "expected"),
    [(1.0, 8, 4), (1.0, 3, 3), (0.3333, 30, 12), (0.5, 30, 8), (0.0, 9, 5)],
)
def test_count_on_node_fills_gpus_and_spreads_the_rest(
    num_gpus: float, num_processes: int, expected: int
) -> None:
    (node,), _ = resolve_nodes(parse_nodes("2xg5.12xlarge"))
    plan = rules.WorkerPlan(num_workers=1, num_cpus=1, num_gpus=num_gpus, num_threads=1)
    assert rules.count_on_node(plan, num_processes, node, num_nodes=2) == expected


def test_check_gpu_room_says_which_gpus_are_too_small() -> None:
    nodes, _ = resolve_nodes(parse_nodes("g4dn.xlarge,p4de.24xlarge,c7i.xlarge"))
    sheet = PlanSheet("train")
    check_gpu_room(14 * GIB, 1, nodes, sheet)
    # 14 GiB with a tenth and 1 GiB more; a T4 shows 15 of 16.
    assert sheet.figures[0].value == round((14 * 1.1 + 1) * GIB)
    (line,) = sheet.missing
    assert line.startswith("g4dn.xlarge: a GPU has about 15 GiB, its workers need about 16.4 GiB")


def test_check_host_room_counts_all_workers_of_a_machine() -> None:
    (node,), _ = resolve_nodes(parse_nodes("2x(cpu=8,mem=16GiB)"))
    plan = rules.WorkerPlan(num_workers=8, num_cpus=1, num_gpus=0, num_threads=1)
    fits, full = PlanSheet("train"), PlanSheet("train")
    # Four on each, and 1.5 GiB for Ray, in 95 % of 16 GiB = 15.2 GiB.
    check_host_room(3 * GIB, plan, 8, [node], fits)
    check_host_room(4 * GIB, plan, 8, [node], full)
    assert fits.missing == []
    assert fits.figures[0].value == 12 * GIB + 1536 * MIB
    (line,) = full.missing
    assert "has 16 GiB of memory, 4 workers and Ray need about 17.5 GiB" in line


def test_run_plan_counts_steps_as_the_sampler_does(
    make_train_job: Callable[..., TrainJob],
    plan_job: Callable[..., PlanOutcome],
    image_set: Any,
    measured: list[tuple[StepShape, dict[str, Any]]],
) -> None:
    changes: dict[str, object] = {"run.epochs": 3, "run.batch": 4, "run.workers": 2}
    job = make_train_job({**changes, "output": "m.pth", "data.val_annotations": str(
        image_set.annotations
    )})  # fmt: skip
    outcome = plan_job(job, "--nodes", BIG_NODE)
    figures = figures_of(outcome)
    inputs = read_inputs(job)
    loader = make_loader(
        job, inputs, rank=0, world_size=2, first_step=0, num_processes=0, pin_memory=False
    )
    assert figures["work"]["steps"] == len(loader) == count_steps(job, 6) == 5
    # 18 places in batches of four.
    assert figures["work"]["images_trained_on"] == 20
    # After steps 2 and 3 an epoch is complete, then comes the end: ceil(6/4), ceil(12/4), 5.
    assert figures["work"]["checkpoints_written"] == 3
    sizes = [path.stat().st_size for path in image_set.folder.glob("*.png")]
    assert figures["traffic"]["read_per_epoch_bytes"] == sum(sizes)
    # 20 images of which the mean is a sixth of all, and six images validated three times.
    expected = 20 * sum(sizes) / 6 + 3 * sum(sizes)
    assert figures["traffic"]["read_per_training_bytes"] == round(expected)
    assert figures["workers"]["cpus"] == 2
    ((shape, options),) = measured
    # The share of a worker; two boxes in each image; processors elsewhere may lack bfloat16.
    assert shape == StepShape(2, inputs.canvas, 2, None, is_on_gpu=False)
    assert (options["optimizer"], options["has_average"]) == ("adamw", True)
    memory = figures["host memory per worker"]
    # A step takes more than two copies of a checkpoint of 2,000 MiB beside the state.
    assert memory["network_bytes"] == max(6 * GIB, (2 * 2000 + 2000) * MIB)
    assert figures["traffic"]["checkpoint_bytes"] == 2000 * MIB
    assert outcome.exit_code == 0
    assert outcome.to_text().endswith("fits")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data.windows": (32, 64)}, (32, 64)),
        ({"data.two_canvases": True, "data.size": None}, None),
    ],
)
def test_run_plan_measures_a_step_on_the_canvas_of_the_training(
    make_train_job: Callable[..., TrainJob],
    plan_job: Callable[..., PlanOutcome],
    measured: list[tuple[StepShape, dict[str, Any]]],
    changes: dict[str, object],
    expected: tuple[int, int] | None,
) -> None:
    job = make_train_job({"run.epochs": 3, "run.batch": 2, "output": "m.pth", **changes})
    inputs = read_inputs(job)
    work = figures_of(plan_job(job, "--nodes", BIG_NODE))["work"]
    ((shape, _),) = measured
    assert shape.canvas == (expected or choose_training_canvas(job, inputs))
    if expected:
        assert work["training_canvas"] == f"{expected[0]}x{expected[1]}"
        assert work["canvas"] == f"{inputs.canvas[0]}x{inputs.canvas[1]}"


@pytest.mark.usefixtures("measured")
def test_run_plan_says_everything_that_a_training_lacks_at_once(
    make_train_job: Callable[..., TrainJob], plan_job: Callable[..., PlanOutcome], tmp_path: Path
) -> None:
    changes = {"run.workers": 8, "data.images": str(tmp_path / "none")}
    job = make_train_job({**changes, "data.windows": (4096, 4096)})
    outcome = plan_job(job, "--nodes", "(cpu=4,gpu=1,mem=6GiB,gpu_mem=7GiB),z9.large")
    lines = outcome.sheet.missing
    assert outcome.exit_code == 1
    assert len(lines) == 6
    assert lines[0].startswith("nodes: 'z9.large' is no machine")
    assert lines[1].startswith("data.windows=(4096, 4096) (--windows) is larger than the ")
    assert f"6 of 6 images are not in {tmp_path / 'none'}, the first: " in lines[2]
    assert lines[3].startswith("run.workers=8 needs 8 GPUs, the cluster has 1:")
    # 6 GiB and a tenth, and 1 GiB; of 7 GiB a driver shows 6.56.
    assert lines[4].startswith(
        "4 CPUs, 1 GPUs: a GPU has about 6.56 GiB, its workers need about 7.6 GiB"
    )
    assert lines[5].startswith("4 CPUs, 1 GPUs: has 6 GiB of memory, 1 worker and Ray need about")


@pytest.mark.usefixtures("measured")
def test_run_plan_goes_on_without_annotations(
    make_train_job: Callable[..., TrainJob], plan_job: Callable[..., PlanOutcome]
) -> None:
    job = make_train_job({"data.annotations": "absent.json", "data.classes": 2, "run.epochs": 2})
    unknown = plan_job(job, "--nodes", BIG_NODE)
    assert "absent.json: no such file" in unknown.sheet.missing[0]
    assert unknown.sheet.missing[1].endswith("is unknown: give --num-images")
    told = plan_job(job, "--nodes", BIG_NODE, "--num-images", "100", "--image-bytes", "1000")
    figures = figures_of(told)
    assert len(told.sheet.missing) == 1
    # 200 places in batches of eight.
    assert figures["work"]["steps"] == 25
    assert figures["traffic"]["read_per_epoch_bytes"] == 100_000
    assert "traffic.read_per_epoch_bytes" in json.loads(told.to_json())["estimates"]


@pytest.mark.usefixtures("measured")
def test_run_plan_queues_the_trials_of_a_sweep(
    make_train_job: Callable[..., TrainJob], plan_job: Callable[..., PlanOutcome], image_set: Any
) -> None:
    text = to_yaml(
        make_train_job({"data.val_annotations": str(image_set.annotations), "run.workers": 2})
    )
    text += "space:\n  optim.peak_lr: {loguniform: [0.001, 0.01]}\nsweep:\n  trials: 10\n"
    outcome = plan_job(text, "--nodes", "(cpu=8,gpu=7,mem=128GiB,gpu_mem=24GiB)")
    figures = figures_of(outcome)
    assert outcome.sheet.verb == "tune"
    # Seven GPUs hold three trials of two; ten trials in threes are four rounds.
    assert figures["sweep"] == {
        "trials": 10,
        "trials_at_once": 3,
        "trials_in_the_longest_queue": 4,
        "varied_settings": 1,
    }
    assert figures["workers"]["gpus"] == figures["workers"]["cpus"] == 6
    assert figures["traffic"]["checkpoints_kept"] == 20
    gradients = figures["GPU memory per worker"]["gradients_bytes"]
    assert figures["traffic"]["sent_per_step_bytes"] == gradients
    assert outcome.exit_code == 0


def test_run_plan_plans_an_inference_of_real_files(
    plan_job: Callable[..., PlanOutcome], image_set: Any, tiny_weights: bytes, tmp_path: Path
) -> None:
    (tmp_path / "m.pth").write_bytes(tiny_weights)
    text = f"model: {tmp_path / 'm.pth'}\nimages: {image_set.folder}\npart_size: 4\nbatch: 2\n"
    outcome = plan_job(text + "decoding: {num_cpus: 8}\n", "--nodes", "2x(cpu=8,mem=64GiB)")
    figures = figures_of(outcome)
    assert outcome.sheet.missing == []
    assert (figures["work"]["images"], figures["work"]["parts"]) == (6, 2)
    # Sixteen CPUs would be eight engines, and there are two parts; eight decode, one is Ray's.
    assert figures["workers"]["workers"] == 2
    assert figures["workers"]["cpus_left_to_ray"] == 6
    assert figures["workers"]["backend"] == "torch"
    memory = figures["host memory per worker"]
    # Eight threads are four batches of two ahead; two more; canvas 64x96; two parts in hand.
    assert memory["canvases_bytes"] == 2 * (3 * 64 * 96) * 2 * (4 + 2)
    sizes = [path.stat().st_size for path in image_set.folder.glob("*.png")]
    assert memory["files_bytes"] == 16 * max(sizes)
    assert memory["decoding_bytes"] <= memory["decoding_at_most_bytes"] == 2 * GIB
    assert figures["traffic"]["read_bytes"] == sum(sizes)
    # 8 CPUs // (2 workers x 2 parts) = 2 tasks of 8 canvases, four times.
    assert figures["object store"]["remote_decoding_bytes"] == 4 * 2 * 8 * 3 * 64 * 96


@pytest.mark.parametrize(
    ("settings", "nodes", "fault"),
    [
        ("model: m.plan\nimages: {}\n", BIG_NODE, "nodes: backend 'tensorrt' needs an NVIDIA GPU"),
        ("model: m.onnx\nimages: {}\n", BIG_NODE, "model: cannot read m.onnx: no such file"),
        ("model: m.pth\nimages: {}/none\n", BIG_NODE, "images: .*/none: no images found"),
        (
            "model: m.pth\nimages: {}\nworkers: 9\npart_size: 2\n",
            BIG_NODE,
            "workers=9, and there are 3 parts: 6 would idle",
        ),
        (
            "model: m.pth\nimages: {}\ndecoding: {{num_cpus: 64}}\n",
            BIG_NODE,
            "decoding.num_cpus=64 leaves none of 64 CPUs to Ray",
        ),
        (
            "model: m.pth\nimages: {}\nworkers: 3\ngpus_per_worker: 0.5\n",
            "g5.xlarge",
            "workers=3 of 0.5 GPUs each do not fit on the 1 GPUs",
        ),
        (
            "model: m.pth\nimages: {}\ncluster: {{gpus: 2}}\n",
            "g5.xlarge",
            "nodes: --gpus 2 counts on more than the 1 of these nodes",
        ),
        (
            "model: m.pth\nimages: {}\ndecoding: {{device: gpu}}\n",
            BIG_NODE,
            "decoding.device=gpu decodes on the engine's GPU, and backend 'torch' has none",
        ),
    ],
)
def test_run_plan_says_what_an_inference_lacks(
    plan_job: Callable[..., PlanOutcome],
    image_set: Any,
    settings: str,
    nodes: str,
    fault: str,
) -> None:
    outcome = plan_job(settings.format(image_set.folder), "--nodes", nodes)
    assert outcome.exit_code == 1
    assert any(re.match(fault, line) for line in outcome.sheet.missing), outcome.sheet.missing


def test_run_plan_says_that_a_listing_was_cut_off(
    plan_job: Callable[..., PlanOutcome], image_set: Any
) -> None:
    text = f"model: m.pth\nimages: {image_set.folder}\n"
    outcome = plan_job(text, "--nodes", BIG_NODE, "--max-listed", "5")
    assert figures_of(outcome)["work"]["images"] == 5
    assert any("more than 5 are in" in line for line in outcome.sheet.missing)
    told = plan_job(text, "--nodes", BIG_NODE, "--max-listed", "5", "--num-images", "1000000")
    assert figures_of(told)["work"]["parts"] == 1314
    assert not any("more than" in line for line in told.sheet.missing)


def test_run_plan_plans_evaluations_and_exports(
    plan_job: Callable[..., PlanOutcome], image_set: Any, tiny_weights: bytes, tmp_path: Path
) -> None:
    (tmp_path / "m.pth").write_bytes(tiny_weights)
    model = tmp_path / "m.pth"
    evaluate = plan_job(f"model: {model}\nannotations: {image_set.annotations}\n")
    assert (evaluate.sheet.verb, evaluate.sheet.missing) == ("evaluate", [])
    assert figures_of(evaluate)["work"]["images"] == 6
    # One reader: eight threads are two batches of four ahead, and more than three batches are
    # asked for: 12 images, two batches more; canvas 64x96.
    canvases = figures_of(evaluate)["host memory per worker"]["canvases_bytes"]
    assert canvases == 3 * 64 * 96 * 4 * (3 + 2)
    onnx = plan_job(f"model: {model}\noutput: m.onnx\n", "--nodes", BIG_NODE)
    assert (onnx.sheet.verb, onnx.sheet.missing) == ("export", [])
    text = f"model: {model}\noutput: m.plan\ngate: {{images: {tmp_path / 'none'}}}\n"
    lines = plan_job(text, "--nodes", BIG_NODE).sheet.missing
    assert lines[0].startswith(f"gate.images={tmp_path / 'none'}: nothing is in this folder")
    assert lines[1] == "nodes: export to an engine builds on a GPU, and none has one"
    (absent,) = plan_job(f"model: {model}\nannotations: absent.json\n").sheet.missing
    assert absent.startswith("annotations: cannot read absent.json")


def test_main_prints_the_plan_and_returns_one_when_something_is_missing(
    tmp_path: Path, image_set: Any, tiny_weights: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.pth").write_bytes(tiny_weights)
    config = tmp_path / "job.yaml"
    config.write_text(f"model: {tmp_path / 'm.pth'}\nannotations: {image_set.annotations}\n")
    argv = ["plan", "--job", str(config), "--nodes"]
    assert cli.main([*argv, "(cpu=2,mem=16GiB)"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["fits"] is True
    assert shown.err.startswith("evaluate on 1 x 2 CPUs, 0 GPUs\nwork\n")
    assert cli.main([*argv, "(cpu=2,mem=1GiB)", "--json"]) == 1
    shown = capsys.readouterr()
    assert "has 1 GiB of memory, 1 worker and Ray need about" in json.loads(shown.out)["missing"][0]
    assert shown.err == ""
    assert cli.main([*argv, "(cpu=2,mem=16GiB)", "--with=--bacth 4"]) == 2
    assert "nearest: --batch" in capsys.readouterr().err
