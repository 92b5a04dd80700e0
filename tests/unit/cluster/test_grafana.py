"""cluster/grafana/retinaray.json: the right metrics under both names, panels that stand apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

METRICS = {
    "retinaray_infer_images_total",
    "retinaray_infer_errors_total",
    "retinaray_infer_detections_total",
    "retinaray_infer_bytes_total",
    "retinaray_infer_stage_seconds_total",
    "retinaray_infer_part_seconds_bucket",
    "retinaray_train_step_seconds_bucket",
    "retinaray_train_images_per_second",
    "retinaray_train_map",
    "retinaray_train_checkpoint_seconds_bucket",
    "retinaray_train_errors_total",
    "retinaray_train_skipped_steps_total",
}


@pytest.fixture
def dashboard(repository: Path) -> dict[str, Any]:
    """The dashboard."""
    content: dict[str, Any] = json.loads(
        (repository / "cluster" / "grafana" / "retinaray.json").read_bytes()
    )
    return content


@pytest.fixture
def expressions(dashboard: dict[str, Any]) -> list[str]:
    """All queries."""
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("page", ["README.md", "docs/how_to/watch_a_run.md"])
def test_pages_say_how_many_panels_there_are(
    dashboard: dict[str, Any], repository: Path, page: str
) -> None:
    text = (repository / page).read_text("utf-8")
    said = re.findall(r"retinaray\.json.*?(\w+) panels", text)
    assert said == [str(len(dashboard["panels"]))]


def test_queries_name_every_metric_and_no_other(expressions: list[str]) -> None:
    found = {name for text in expressions for name in re.findall(r"retinaray_\w+", text)}
    assert found == METRICS


def test_queries_find_metrics_with_and_without_rays_prefix(expressions: list[str]) -> None:
    matchers = {m for text in expressions for m in re.findall(r'__name__=~"([^"]+)"', text)}
    assert len(matchers) == len(METRICS)
    for name in METRICS:
        assert sum(bool(re.fullmatch(matcher, f"ray_{name}")) for matcher in matchers) == 1
        assert sum(bool(re.fullmatch(matcher, name)) for matcher in matchers) == 1
        assert not any(re.fullmatch(matcher, f"other_{name}") for matcher in matchers)


def test_queries_rate_counters_and_close_their_brackets(expressions: list[str]) -> None:
    for text in expressions:
        bare = re.sub(r'"[^"]*"', "", text)
        for left, right in ("()", "{}", "[]"):
            assert bare.count(left) == bare.count(right), text
        for found in re.finditer(r"retinaray_\w+_(total|bucket)", text):
            before = text[: found.start()]
            # Two panels show counts since the start; everywhere else it is a rate.
            assert re.search(r"(rate\(|^sum\()\{__name__=~\"\(ray_\)\?$", before), text
        assert "histogram_quantile" not in text or "by (le)" in text


def test_stages_are_those_of_the_code(expressions: list[str], dashboard: dict[str, Any]) -> None:
    from retinaray.inference.stage_times import STAGE_FIELDS

    descriptions = [panel["description"] for panel in dashboard["panels"]]
    stages = {field.removesuffix("_s") for field in STAGE_FIELDS if field.endswith("_s")}
    named = {
        s
        for text in expressions
        for m in re.findall(r'stage=~?"([^"]+)"', text)
        for s in m.split("|")
    }
    assert named == {"starved", "engine"}
    assert named <= stages
    (described,) = [text for text in descriptions if text.startswith("Seconds per second")]
    assert all(stage in described for stage in stages)


def test_panels_stand_apart_and_say_what_they_show(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["description"] for panel in panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        ), (one, other)
    assert max(panel["gridPos"]["x"] + panel["gridPos"]["w"] for panel in panels) <= 24


def test_variables_that_are_used_are_defined(
    dashboard: dict[str, Any], walk: Callable[[Any], Iterator[tuple[str, Any]]]
) -> None:
    defined = {variable["name"] for variable in dashboard["templating"]["list"]}
    texts = [value for _, value in walk(dashboard["panels"]) if isinstance(value, str)]
    used = {name for text in texts for name in re.findall(r"\$\{?(\w+)", text)}
    assert used == defined | {"__rate_interval"}
