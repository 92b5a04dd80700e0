"""How a job's settings change the network that is trained, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed
from torch import nn

from retinaray.artifact import dump_weights
from retinaray.assembly import training
from retinaray.assembly.training import (
    choose_autocast,
    make_card,
    make_loop_settings,
    make_state,
    read_inputs,
)
from retinaray.config.schema import TrainJob
from retinaray.detector.backbone import BACKBONE_NAMES, Backbone
from retinaray.errors import ConfigError

JobFactory = Callable[..., TrainJob]


@pytest.fixture
def backbone_weights(tmp_path: Path) -> str:
    """Weights for the tests' ResNet10."""
    torch.manual_seed(9)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(dict(Backbone("ResNet10FPN", norm="bn").body.state_dict()), path)
    return str(path)


@pytest.mark.parametrize("num_stages", [0, 1, 4])
@pytest.mark.usefixtures("one_thread")
def test_make_card_freezes_the_stem_and_the_first_stages(
    make_train_job: JobFactory, backbone_weights: str, num_stages: int
) -> None:
    changes = {
        "model.freeze_at": num_stages,
        "model.backbone_weights": backbone_weights,
        "model.norm": "bn",
    }
    job = make_train_job(changes)
    card, model = make_card(job, read_inputs(job), run_id="")
    state = make_state(job, model.train())
    frozen = ("conv1.", "bn1.", *(f"layer{i + 1}." for i in range(num_stages)))
    if not num_stages:
        frozen = ("nothing",)
    expected = {n for n, _ in model.backbone.body.named_parameters() if n.startswith(frozen)}
    found = {n for n, p in model.backbone.body.named_parameters() if not p.requires_grad}
    assert found == expected
    taken = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert taken == {id(p) for p in model.parameters() if p.requires_grad}
    before = {key: value.clone() for key, value in model.backbone.body.state_dict().items()}
    with torch.no_grad():
        model(torch.full((2, 3, 64, 64), 200, dtype=torch.uint8))
    changed = {k for k, v in model.backbone.body.state_dict().items() if not v.equal(before[k])}
    # What is trained has statistics of this batch.
    assert bool(changed) == (num_stages < 4)
    assert not {key for key in changed if key.startswith(frozen)}
    assert card.architecture.norm == "bn"


def test_make_card_starts_from_a_whole_model_when_it_is_given_one(
    make_train_job: JobFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_train_job({"run.seed": 5})
    inputs = read_inputs(first)
    card, model = make_card(first, inputs, run_id="")
    path = tmp_path / "start.pth"
    path.write_bytes(dump_weights(card, model.state_dict()))
    with caplog.at_level("INFO", "retinaray.assembly.training"):
        again, taken = make_card(
            make_train_job({"model.fine_tune": str(path)}), inputs, run_id="second"
        )
    assert all(value.equal(model.state_dict()[key]) for key, value in taken.state_dict().items())
    assert (again.run_id, again.architecture) == ("second", card.architecture)
    assert f"{path}: {len(taken.state_dict())} of {len(taken.state_dict())} tensors" in caplog.text


def test_make_train_job_refuses_two_beginnings(make_train_job: JobFactory) -> None:
    changes = {"model.fine_tune": "a.pth", "model.backbone_weights": "b.pth"}
    with pytest.raises(ConfigError, match="a whole model has its backbone; keep --fine-tune or"):
        make_train_job(changes)


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_freeze_cuts_each_backbone_where_its_maps_end(name: str) -> None:
    with torch.device("meta"):
        for num_stages in range(1, 5):
            backbone = Backbone(name, norm="bn")
            backbone.freeze(num_stages)
            maps = backbone(torch.zeros(2, 3, 64, 64))
            has_gradient = [feature.requires_grad for feature in maps]
            assert has_gradient == [False] * num_stages + [True] * (4 - num_stages)
            is_training = {m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)}
            assert is_training == ({False} if num_stages == 4 else {False, True})


def test_freeze_refuses_more_stages_than_there_are() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"num_stages=5: expected 0 to 4"):
        Backbone("ResNet10FPN").freeze(5)


def test_make_state_keeps_plain_batch_norms_when_there_is_no_gpu(
    make_train_job: JobFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_train_job({"model.norm": "sync_bn"})
    card, model = make_card(job, read_inputs(job), run_id="")
    assert card.architecture.norm == "bn"
    monkeypatch.setattr(training, "_has_other_workers", lambda: True)
    make_state(job, model)
    assert not [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert type(model.backbone.body.bn1) is nn.BatchNorm2d


def test_share_statistics_keeps_keys_weights_and_what_is_frozen() -> None:
    backbone = Backbone("ResNet10FPN", norm="sync_bn").train()
    backbone.freeze(1)
    before = dict(backbone.named_parameters())
    keys = backbone.state_dict().keys()
    training.share_statistics(backbone)
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    assert backbone.state_dict().keys() == keys
    assert all(parameter is before[name] for name, parameter in backbone.named_parameters())
    assert not backbone.body.bn1.training
    assert not backbone.body.layer1[0].bn1.training
    assert backbone.body.layer2[0].bn1.training


def test_make_state_compiles_for_fixed_shapes_when_it_is_asked_to(
    make_train_job: JobFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append((self, options)))
    for is_wanted in (False, True):
        job = make_train_job({"run.compile": is_wanted})
        state = make_state(job, make_card(job, read_inputs(job), run_id="")[1])
        # In place: a wrapper would give other names to the weights.
        assert asked == ([(state.model, {"dynamic": False})] if is_wanted else [])


@pytest.mark.parametrize(("momentum", "expected"), [(None, 0.9), (0.0, 0.0), (0.5, 0.5)])
def test_make_state_takes_the_momentum_over(
    make_train_job: JobFactory, momentum: float | None, expected: float
) -> None:
    job = make_train_job({"optim.optimizer": "sgd", "optim.momentum": momentum})
    state = make_state(job, make_card(job, read_inputs(job), run_id="")[1])
    assert [group["momentum"] for group in state.optimizer.param_groups] == [expected] * 2


def test_make_loop_settings_takes_the_step_over(make_train_job: JobFactory) -> None:
    job = make_train_job({"run.accumulate": 4, "optim.max_skipped_steps": 3})
    settings = make_loop_settings(job, 10, autocast_dtype=None)
    assert (settings.accumulate, settings.max_skipped_steps) == (4, 3)


def test_choose_autocast_refuses_float16_when_there_is_no_gpu(make_train_job: JobFactory) -> None:
    assert choose_autocast("fp16", torch.device("cuda")) == torch.float16
    with pytest.raises(ConfigError, match=r"run\.precision=fp16 .* computes on cpu: use auto"):
        choose_autocast("fp16", torch.device("cpu"))
    job = make_train_job({"run.precision": "fp16"})
    with pytest.raises(ConfigError, match="needs a GPU in each worker"):
        make_state(job, make_card(job, read_inputs(job), run_id="")[1])


def test_make_state_scales_no_loss_when_the_precision_is_another(
    make_train_job: JobFactory,
) -> None:
    job = make_train_job({"run.precision": "bf16"})
    assert make_state(job, make_card(job, read_inputs(job), run_id="")[1]).scaler is None
