"""A training job's settings as core objects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from retinaray.assembly.training import (
    check_settings,
    choose_autocast,
    count_steps,
    find_schedule_oddities,
    hash_settings,
    make_augment_settings,
    make_card,
    make_loader,
    make_loop_settings,
    make_state,
    read_inputs,
    resolve_paths,
)
from retinaray.assembly.training_inputs import find_size_oddities
from retinaray.config.schema import TrainJob
from retinaray.errors import CheckpointError, ConfigError, DatasetError, StorageError
from retinaray.training.schedule import Schedule

JobFactory = Callable[..., TrainJob]


def test_resolve_paths_makes_local_paths_absolute(
    make_train_job: JobFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"")
    changes: dict[str, object] = {
        "output": "runs/model.pth",
        "data.images": "images",
        "data.annotations": "s3://bucket/train.json",
        "data.val_annotations": "val.json",
        "model.backbone_weights": "w.pth",
    }
    job = resolve_paths(make_train_job(changes))
    assert job.output == str(tmp_path / "runs" / "model.pth")
    assert job.data.images == str(tmp_path / "images")
    assert job.data.annotations == "s3://bucket/train.json"
    assert job.data.val_annotations == str(tmp_path / "val.json")
    # Validation images default to the training images' folder.
    assert job.data.val_images == str(tmp_path / "images")
    # Workers run in folders of their own.
    assert job.model.backbone_weights == str(tmp_path / "w.pth")
    assert resolve_paths(job) == job


def test_resolve_paths_leaves_the_names_of_weights_alone(make_train_job: JobFactory) -> None:
    job = make_train_job({"model.backbone_weights": "IMAGENET1K_V1"})
    assert resolve_paths(job).model.backbone_weights == "IMAGENET1K_V1"


def test_read_inputs_reads_both_sets_and_chooses_the_canvas(make_train_job: JobFactory) -> None:
    job = make_train_job()
    inputs = read_inputs(job)
    assert len(inputs.train) == 6
    assert inputs.val is None
    # Sides by 32 that hold 99 of 100 images at short side 64, long side 96 at most.
    assert inputs.canvas == (96, 96)
    changes = {"data.val_annotations": job.data.annotations, "data.size": [64, 128]}
    inputs = read_inputs(make_train_job(changes))
    assert inputs.val is not None
    assert inputs.val.categories == inputs.train.categories
    assert inputs.canvas == (64, 128)


def test_read_inputs_refuses_sets_of_different_categories(
    make_train_job: JobFactory, image_set: Any, write_json: Callable[[str, Any], str]
) -> None:
    other = copy.deepcopy(image_set.coco)
    other["categories"][1]["name"] = "dog"
    path = write_json("val.json", other)
    with pytest.raises(
        DatasetError, match=r"val.json has other categories .*\(17, 'class 1'\).*\(17, 'dog'\)"
    ):
        read_inputs(make_train_job({"data.val_annotations": path}))


def test_read_inputs_refuses_another_number_of_classes(make_train_job: JobFactory) -> None:
    with pytest.raises(DatasetError, match="num_classes is 3, but `categories` has 2"):
        read_inputs(make_train_job({"data.classes": 3}))


@pytest.mark.parametrize("key", ["data.annotations", "data.val_annotations"])
def test_read_inputs_refuses_a_set_without_images(
    make_train_job: JobFactory, image_set: Any, write_json: Callable[[str, Any], str], key: str
) -> None:
    path = write_json("empty.json", image_set.coco | {"images": [], "annotations": []})
    with pytest.raises(DatasetError, match=r"empty\.json: no images"):
        read_inputs(make_train_job({key: path}))


def test_read_inputs_passes_on_that_a_file_is_missing(make_train_job: JobFactory) -> None:
    with pytest.raises(StorageError, match=r"absent\.json: no such file"):
        read_inputs(make_train_job({"data.annotations": "absent.json"}))


@pytest.mark.parametrize("objective", ["AP", "AR_100", "AP_small", "AP/class 0", "AP/class 1"])
def test_check_settings_takes_what_a_validation_reports(
    make_train_job: JobFactory, image_set: Any, objective: str
) -> None:
    changes = {"data.val_annotations": str(image_set.annotations), "run.objective": objective}
    job = make_train_job({**changes, "run.latency_price": 0.1})
    check_settings(job, read_inputs(job))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"run.objective": "AP_small"}, r"run\.objective=AP_small, run\.latency_price=0 without"),
        ({"run.latency_price": 0.01}, r"run\.objective=AP, run\.latency_price=0\.01 without data"),
    ],
)
def test_check_settings_refuses_a_wish_when_nothing_is_validated(
    make_train_job: JobFactory, changes: dict[str, object], named: str
) -> None:
    job = make_train_job(changes)
    with pytest.raises(ConfigError, match=f"{named}.*give --val-annotations"):
        check_settings(job, read_inputs(job))


def test_check_settings_is_content_with_defaults_when_nothing_is_validated(
    make_train_job: JobFactory,
) -> None:
    job = make_train_job()
    inputs = read_inputs(job)
    assert inputs.val is None
    check_settings(job, inputs)


def test_check_settings_names_the_classes_when_there_is_no_such_class(
    make_train_job: JobFactory, image_set: Any
) -> None:
    changes = {"data.val_annotations": str(image_set.annotations), "run.objective": "AP/dog"}
    job = make_train_job(changes)
    with pytest.raises(
        ConfigError, match=r"^run\.objective=AP/dog: no such class; .* one of class 0, class 1$"
    ):
        check_settings(job, read_inputs(job))


def test_check_settings_tells_all_faults_at_once(make_train_job: JobFactory) -> None:
    job = make_train_job({"run.objective": "AP/dog", "data.windows": (4096, 64)})
    with pytest.raises(ConfigError) as caught:
        check_settings(job, read_inputs(job))
    starts = [line.partition(" ")[0] for line in str(caught.value).splitlines()]
    assert starts == ["run.objective=AP/dog,", "run.objective=AP/dog:", "data.windows=(4096,"]


def test_hash_settings_changes_with_any_setting(make_train_job: JobFactory) -> None:
    hashes = [
        hash_settings(make_train_job(changes))
        for changes in ({}, {}, {"run.seed": 1}, {"anchors.scales": [4.0]}, {"optim.peak_lr": 5e-4})
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
    assert all(len(entry) == 64 for entry in hashes)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"run.epochs": 3, "run.batch": 4}, 8),  # 3 * 10 / 4 = 7.5
        ({"run.epochs": 2, "run.batch": 5}, 4),
        ({"run.iters": 7, "run.batch": 4}, 7),
        ({"run.batch": 8}, 50),  # 40 epochs
    ],
)
def test_count_steps_rounds_up(
    make_train_job: JobFactory, changes: dict[str, object], steps: int
) -> None:
    assert count_steps(make_train_job(changes), 10) == steps


def test_make_card_gives_the_same_network_for_the_same_seed(make_train_job: JobFactory) -> None:
    inputs = read_inputs(make_train_job())
    networks = []
    for seed in (5, 5, 6):
        torch.rand(7)  # what was drawn before does not matter
        job = make_train_job({"run.seed": seed})
        networks.append(make_card(job, inputs, run_id="r")[1].state_dict())
    first, again, other = networks
    assert all(torch.equal(first[key], value) for key, value in again.items())
    assert not torch.equal(first["class_head.output.weight"], other["class_head.output.weight"])


def test_make_card_describes_the_network(make_train_job: JobFactory) -> None:
    changes = {"anchors.levels": "2-7", "anchors.scales": [2.0, 3.0], "anchors.convention": "odtk"}
    job = make_train_job(changes)
    inputs = read_inputs(job)
    card, model = make_card(job, inputs, run_id="run-1")
    assert card.architecture.norm == "gn"  # automatic, from scratch
    assert card.anchors.strides == (4, 8, 16, 32, 64, 128)
    assert card.anchors.scales == (2.0, 3.0)
    assert card.anchors.convention == "odtk"
    assert card.categories.ids == (7, 17)
    assert card.canvas == inputs.canvas
    assert card.score_thresholds == (0.05, 0.05)
    assert card.run_id == "run-1"
    assert card.training["data"]["annotations"] == job.data.annotations
    assert model.anchor_spec == card.anchors
    rebuilt = card.build_model()
    rebuilt.load_state_dict(model.state_dict())


def test_make_card_loads_backbone_weights_and_freezes_their_statistics(
    make_train_job: JobFactory, tmp_path: Path
) -> None:
    inputs = read_inputs(make_train_job())
    _, source = make_card(make_train_job({"model.norm": "bn", "run.seed": 9}), inputs, run_id="")
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(dict(source.backbone.body.state_dict()), path)
    job = make_train_job({"model.backbone_weights": str(path)})
    card, model = make_card(job, inputs, run_id="")
    assert card.architecture.norm == "frozen_bn"
    assert not card.architecture.stride_in_1x1
    expected = source.backbone.body.conv1.weight
    assert torch.equal(model.backbone.body.conv1.weight, expected)
    safetensors.torch.save_file({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"w.safetensors: weights do not fit ResNet10FPN"):
        make_card(job, inputs, run_id="")


@pytest.mark.parametrize(
    ("changes", "rate", "decay", "kind"),
    [
        ({}, 5e-4, 0.05, torch.optim.AdamW),
        ({"optim.optimizer": "sgd"}, 0.01, 1e-4, torch.optim.SGD),
        ({"optim.peak_lr": 0.3, "optim.weight_decay": 0.0}, 0.3, 0.0, torch.optim.AdamW),
    ],
)
def test_make_state_fills_in_the_optimizers_defaults(
    make_train_job: JobFactory,
    changes: dict[str, object],
    rate: float,
    decay: float,
    kind: type[torch.optim.Optimizer],
) -> None:
    job = make_train_job(changes)
    state = make_state(job, make_card(job, read_inputs(job), run_id="")[1])
    assert type(state.optimizer) is kind
    assert state.optimizer.param_groups[0]["lr"] == rate
    assert state.optimizer.param_groups[0]["weight_decay"] == decay
    assert state.average is not None
    assert state.step == 0


def test_make_state_has_no_average_when_it_is_off(make_train_job: JobFactory) -> None:
    job = make_train_job({"optim.ema_decay": 0.0})
    assert make_state(job, make_card(job, read_inputs(job), run_id="")[1]).average is None


@pytest.mark.parametrize(
    ("changes", "schedule"),
    [
        # 10 images, batch 8, 40 epochs: 50 steps, a tenth of them warm-up.
        ({}, Schedule(peak_lr=5e-4, total_steps=50, warmup_steps=5)),
        (
            {"run.iters": 30_000, "optim.optimizer": "sgd"},
            Schedule(peak_lr=0.01, total_steps=30_000, warmup_steps=1000),
        ),
        (
            {"optim.warmup_steps": 0, "optim.milestones": [10, 20], "optim.gamma": 0.5},
            Schedule(
                peak_lr=5e-4, total_steps=50, kind="milestones", milestones=(10, 20), gamma=0.5
            ),
        ),
    ],
)
def test_make_loop_settings_fills_in_the_schedule(
    make_train_job: JobFactory, changes: dict[str, object], schedule: Schedule
) -> None:
    settings = make_loop_settings(make_train_job(changes), 10, autocast_dtype=None)
    assert settings.schedule == schedule
    assert settings.checkpoint_steps[-1] == schedule.total_steps


def test_make_loop_settings_takes_the_loss_over(make_train_job: JobFactory) -> None:
    changes = {
        "loss.focal_alpha": 0.4,
        "loss.focal_gamma": 1.5,
        "loss.box_loss": "giou",
        "loss.box_weight": 2.0,
        "loss.anchor_ious": [0.3, 0.6],
        "loss.keep_best_anchor": False,
        "run.val_every": 2,
        "run.epochs": 4,
        "run.batch": 5,
    }
    settings = make_loop_settings(make_train_job(changes), 10, autocast_dtype=torch.bfloat16)
    assert (settings.loss.focal_alpha, settings.loss.focal_gamma) == (0.4, 1.5)
    assert (settings.loss.box_loss, settings.loss.box_weight) == ("giou", 2.0)
    assert (settings.loss.background_iou, settings.loss.foreground_iou) == (0.3, 0.6)
    assert not settings.loss.keep_best_anchor
    assert settings.checkpoint_steps == (4, 8)
    assert settings.autocast_dtype == torch.bfloat16


def test_make_loader_gives_each_worker_its_slice_of_the_same_batches(
    make_train_job: JobFactory,
) -> None:
    job = make_train_job({"run.batch": 4, "run.iters": 3, "data.size": [64, 64]})
    inputs = read_inputs(job)

    def load(rank: int, world_size: int, first_step: int = 0) -> list[Any]:
        loader = make_loader(
            job,
            inputs,
            rank=rank,
            world_size=world_size,
            first_step=first_step,
            num_processes=0,
            pin_memory=False,
        )
        return list(loader)

    whole, halves = load(0, 1), [load(0, 2), load(1, 2)]
    assert len(whole) == 3
    for step, batch in enumerate(whole):
        left, right = halves[0][step], halves[1][step]
        assert left.image_ids + right.image_ids == batch.image_ids
        assert torch.equal(torch.cat((left.images, right.images)), batch.images)
    resumed = load(0, 1, first_step=2)
    assert [batch.image_ids for batch in resumed] == [whole[2].image_ids]
    assert torch.equal(resumed[0].images, whole[2].images)
    # Another number of workers goes on with the same images.
    left, right = (load(rank, 2, first_step=2)[0] for rank in (0, 1))
    assert left.image_ids + right.image_ids == whole[2].image_ids
    assert torch.equal(torch.cat((left.images, right.images)), whole[2].images)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"run.iters": 90, "optim.milestones": [60, 80]}, []),
        ({"run.iters": 70, "optim.milestones": [60, 80]}, ["80 of 70 steps are never reached"]),
        # 2 epochs of 6 images by 4.
        ({"run.epochs": 2, "optim.milestones": [3, 6000]}, ["3, 6000 of 3 steps are never"]),
        ({"run.iters": 50, "optim.warmup_steps": 50}, ["50 (--warmup) of 50 steps: the learning"]),
        ({"run.iters": 50, "optim.warmup_steps": 49}, []),
        ({"optim.peak_lr": 0.01}, ["20 times AdamW's usual 0.0005"]),
        ({"optim.peak_lr": 0.004}, []),
        ({"optim.peak_lr": 0.01, "optim.optimizer": "sgd"}, []),
    ],
)
def test_find_schedule_oddities_tells_what_hardly_anybody_means(
    make_train_job: JobFactory, changes: dict[str, Any], words: list[str]
) -> None:
    found = find_schedule_oddities(make_train_job({"run.batch": 4, **changes}), num_images=6)
    assert len(found) == len(words)
    assert all(part in line for part, line in zip(words, found, strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # A canvas of 64x96 has two thirds of the pixels of 96x96.
        ({}, ["share a canvas of 96x96: --two-canvases trains them on 64x96 and 96x64, 67% of"]),
        ({"data.two_canvases": True}, []),
        ({"data.size": [96, 96]}, []),
        ({"data.two_canvases": True, "augment.jitter": [40, 64]}, []),
        (
            {"data.two_canvases": True, "augment.jitter": [40, 65]},
            ["short sides of up to 65 px on a canvas for 64 px"],
        ),
    ],
)
def test_find_size_oddities_tells_of_padding_and_of_cuts(
    make_train_job: JobFactory, changes: dict[str, Any], words: list[str]
) -> None:
    job = make_train_job(changes)
    found = find_size_oddities(job, read_inputs(job))
    assert len(found) == len(words)
    assert all(part in line for part, line in zip(words, found, strict=True))


def test_make_augment_settings_turns_jitter_into_a_factor(make_train_job: JobFactory) -> None:
    assert make_augment_settings(make_train_job()).scale_range == (0.8, 1.25)
    job = make_train_job({"augment.jitter": [32, 96], "augment.mosaic": 0.25})
    settings = make_augment_settings(job)
    assert settings.scale_range == (0.5, 1.5)
    assert (settings.mosaic, settings.flip, settings.hue) == (0.25, 0.5, 0.02)
    sized = make_train_job({"augment.jitter": [96, 192], "data.size": [128, 96]})
    assert make_augment_settings(sized).scale_range == (1, 2), "of the canvas, not of --resize"


def test_choose_autocast_follows_the_request_then_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    assert choose_autocast("fp32", cpu) is None
    assert choose_autocast("bf16", cpu) == torch.bfloat16
    for has_bf16, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_bf16: has)
        assert choose_autocast("auto", cpu) == dtype
