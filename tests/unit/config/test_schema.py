from __future__ import annotations

import inspect
import shlex
from pathlib import Path

import pytest
from pydantic import ValidationError

from retinaray.config import schema
from retinaray.config.loading import load_from_argv
from retinaray.config.nodes import expect_rule, require
from retinaray.config.options import OptionTable

NODES = [
    cls for cls in vars(schema).values() if inspect.isclass(cls) and issubclass(cls, schema.Config)
]


def test_jobs_lists_every_job_class() -> None:
    written = {cls for cls in NODES if issubclass(cls, schema.Job) and cls is not schema.Job}
    assert set(schema.JOBS) == written
    assert len(schema.JOBS) == 15


@pytest.mark.parametrize("node", NODES, ids=lambda cls: cls.__name__)
def test_config_explains_every_field_and_section(node: type[schema.Config]) -> None:
    assert inspect.getdoc(node)
    unexplained = [
        name
        for name, field in node.model_fields.items()
        if not field.description and not OptionTable(node).sections.get(name)
    ]
    assert unexplained == []


@pytest.mark.parametrize("job_class", schema.JOBS, ids=lambda cls: cls.verb)
def test_job_sections_default_to_the_defaults_of_their_fields(job_class: type[schema.Job]) -> None:
    # The help shows the field's own default; a section with another one would make it lie.
    sections = OptionTable(job_class).sections
    for name, section in sections.items():
        field = job_class.model_fields[name]
        assert field.is_required() or field.default == section()


@pytest.mark.parametrize("job_class", schema.JOBS, ids=lambda cls: cls.verb)
def test_job_examples_are_valid_command_lines(
    job_class: type[schema.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    assert job_class.examples
    for example in job_class.examples:
        program, verb, *argv = shlex.split(example)
        assert (program, verb) == ("retinaray", job_class.verb)
        assert isinstance(load_from_argv(job_class, argv), job_class)


def test_anchor_config_defaults_to_three_scales_of_one_octave() -> None:
    # 4, 4 * 2^(1/3) = 5.0397, 4 * 2^(2/3) = 6.3496
    assert schema.AnchorConfig().scales == pytest.approx((4.0, 5.0397, 6.3496), abs=1e-4)


def test_config_is_frozen() -> None:
    anchors = schema.AnchorConfig()
    with pytest.raises(ValidationError, match="frozen"):
        anchors.scales = (1.0,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "size"),
    [(640, (640, 640)), ([480], (480, 480)), ([480, 640], (480, 640)), ("512", (512, 512))],
)
def test_size_is_a_square_when_one_number_comes(given: object, size: tuple[int, int]) -> None:
    assert schema.DetectionConfig.model_validate({"size": given}).size == size


@pytest.mark.parametrize(
    ("node", "values", "match"),
    [
        (
            schema.TrainDataConfig,
            {"annotations": "a", "resize": 900, "max_size": 800},
            r"data\.max_size=800 is below data\.resize=900",
        ),
        (
            schema.TrainDataConfig,
            {"annotations": "a", "val_images": "v"},
            r"data\.val_images=v without data\.val_annotations",
        ),
        (schema.AugmentConfig, {"jitter": (900, 800)}, r"augment\.jitter=\(900, 800\)"),
        (schema.LossConfig, {"anchor_ious": (0.5, 0.4)}, r"loss\.anchor_ious=\(0\.5, 0\.4\)"),
        (schema.LossConfig, {"anchor_ious": (0.0, 0.4)}, r"0 < LOW"),
        (schema.LossConfig, {"anchor_ious": (0.4, 1.0)}, r"HIGH < 1"),
        (schema.OptimConfig, {"milestones": (200, 100)}, r"optim\.milestones=\(200, 100\)"),
        (schema.OptimConfig, {"milestones": (100, 100)}, "rising steps"),
        (schema.TrainRunConfig, {"epochs": 3, "iters": 9}, r"run\.epochs=3 and run\.iters=9"),
        (schema.TrainRunConfig, {"batch": 8, "workers": 3}, "multiple of 3"),
        (schema.DetectionConfig, {"resize": 640}, r"detection\.resize=640 alone"),
        (schema.DetectionConfig, {"max_size": 640}, r"detection\.max_size=640 alone"),
        (
            schema.DetectionConfig,
            {"size": 640, "resize": 640, "max_size": 640},
            r"detection\.size=\(640, 640\) and detection\.resize=640 with",
        ),
        (
            schema.DetectionConfig,
            {"resize": 800, "max_size": 640},
            r"detection\.max_size=640 is below detection\.resize=800",
        ),
        (
            schema.AnchorsJob,
            {"annotations": "a", "resize": 900, "max_size": 800},
            "max_size=800 is below resize=900",
        ),
        (schema.EvaluateJob, {"annotations": "a"}, "one of them only"),
        (
            schema.EvaluateJob,
            {"annotations": "a", "model": "m.pth", "kitti": {"dump": "d"}},
            "one of them only",
        ),
        (schema.SelectionConfig, {"limit": 3, "sample": 0.5}, "keep one of them"),
        (schema.SelectionConfig, {"sample": 2.5}, "a whole number of images"),
        (schema.SelectionConfig, {"min_bytes": 9, "max_bytes": 8}, "nothing could be left"),
        (schema.WriteConfig, {"crops": True}, "give --draw N"),
        (schema.SweepConfig, {"rule": "precision=1.5"}, r"in \(0, 1\]"),
        (schema.ThresholdsJob, {"model": "m", "annotations": "a", "rule": "fppi=0"}, "X > 0"),
        (schema.TrainRunConfig, {"objective": "AP/"}, "a class's AP as in AP/car"),
        (schema.ReadingConfig, {"endpoint_url": "localhost:9000"}, "starts with http://"),
        (schema.ExportJob, {"model": "m", "output": "m.trt"}, r"ends in \.onnx"),
        (
            schema.ExportJob,
            {"model": "m", "output": "m.onnx", "precision": "int8"},
            "calibration.images is missing",
        ),
        (
            schema.ExportJob,
            {"model": "m", "output": "m.onnx", "calibration": {"images": "d"}},
            "without effect: precision=fp32",
        ),
        (
            schema.BundleJob,
            {
                "model": "m",
                "output": "d",
                "target": "jetpack5",
                "precision": "int8",
                "calibration": {"images": "d", "quantizer": "modelopt", "modelopt_python": "p"},
            },
            "TensorRT 8 of target=jetpack5",
        ),
        (
            schema.BundleJob,
            {
                "model": "m",
                "output": "d",
                "target": "jetpack6",
                "precision": "int8",
                "calibration": {"images": "d", "quantizer": "modelopt"},
            },
            "modelopt_python is missing",
        ),
        (
            schema.ExportJob,
            {"model": "m", "output": "m.onnx", "batch": (4, 2, 8)},
            "least <= usual <= most",
        ),
        (schema.TrainDataConfig, {"annotations": ""}, "at least 1 character"),
        (schema.AnchorConfig, {"scales": (4.0, float("nan"))}, "finite"),
    ],
)
def test_node_refuses_values_that_contradict_each_other(
    node: type[schema.Config], values: dict[str, object], match: str
) -> None:
    with pytest.raises(ValidationError, match=match):
        node.model_validate(values)


def test_train_job_refuses_frozen_statistics_when_weights_are_random() -> None:
    data = {"annotations": "a"}
    with pytest.raises(ValidationError, match=r"model\.norm=frozen_bn with model\.backbone_weight"):
        schema.TrainJob.model_validate(
            {"output": "m.pth", "data": data, "model": {"norm": "frozen_bn"}}
        )


@pytest.mark.parametrize(
    ("node", "values"),
    [
        (schema.TrainDataConfig, {"annotations": "a", "resize": 800, "max_size": 800}),
        (schema.AugmentConfig, {"jitter": (800, 800)}),
        (schema.LossConfig, {"anchor_ious": (0.5, 0.5)}),
        (schema.DetectionConfig, {"resize": 640, "max_size": 640}),
        (schema.TrainRunConfig, {"batch": 8, "workers": 8}),
    ],
)
def test_node_takes_values_on_the_edge_of_a_rule(
    node: type[schema.Config], values: dict[str, object]
) -> None:
    assert node.model_validate(values).model_dump(include=set(values)) == values


@pytest.mark.parametrize(
    "rule", ["f1", "precision=1", "precision=0.9", "recall=1e-3", "fppi=2.5", "fppi=0.1"]
)
def test_expect_rule_takes_every_rule(rule: str) -> None:
    assert expect_rule(rule) == rule


@pytest.mark.parametrize(
    "rule",
    [
        *("", "F1", "f1=0.5", "precision", "precision=", "precision=0", "recall=1.01"),
        *("recall=nan", "fppi=-1", "fppi=x", "fppi=nan", "map=0.5", "=0.5"),
    ],
)
def test_expect_rule_refuses_what_is_none(rule: str) -> None:
    with pytest.raises(ValueError, match=r"^expected f1, precision=P or recall=R with a number in"):
        expect_rule(rule)


@pytest.mark.parametrize(
    ("levels", "strides"), [("3-7", (8, 16, 32, 64, 128)), ("2-7", (4, 8, 16, 32, 64, 128))]
)
def test_anchor_config_strides_are_powers_of_two(levels: str, strides: tuple[int, ...]) -> None:
    assert schema.AnchorConfig.model_validate({"levels": levels}).strides == strides


def test_require_names_every_broken_rule_and_no_other() -> None:
    with pytest.raises(ValueError, match=r"^first\nthird$"):
        require([(False, "first"), (True, "second"), (False, "third")])
