"""What a real run, on real Ray and a real S3 server, leaves and shows: names whole, secrets not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from retinaray.demo.embedded_s3 import EmbeddedS3

pytestmark = pytest.mark.local_ray


def _read_json(run: Any, name: str) -> Any:
    return json.loads(run.objects[f"{run.outcome.run}/{name}"])


def _secrets(server: EmbeddedS3) -> list[str]:
    # The pieces of signed requests stand for what is made of the secret.
    return [server.secret_key, "X-Amz-Signature", "AWS4-HMAC-SHA256"]


def test_run_inference_names_every_image_as_it_is_called(trusted_run: Any) -> None:
    rows = _read_json(trusted_run, "images.json")
    assert [row["uri"] for row in rows] == trusted_run.wanted
    assert {(row["height"], row["width"]) for row in rows} == {(64, 96)}
    found = _read_json(trusted_run, "detections.json")
    assert {entry["image_id"] for entry in found} == {row["image_id"] for row in rows}


def test_run_inference_explains_every_name_that_is_no_image(trusted_run: Any) -> None:
    run = trusted_run
    errors = [
        json.loads(line)
        for uri, content in run.objects.items()
        if uri.startswith(f"{run.outcome.run}/errors/")
        for line in content.splitlines()
    ]
    assert {error["uri"] for error in errors} == set(run.faulty)
    assert len(errors) == len(run.faulty)
    for error in errors:
        assert run.faulty[error["uri"]] in error["reason"]
        assert "Traceback" not in error["reason"]
    assert run.outcome.totals.num_errors == len(run.faulty)


def test_run_inference_writes_below_its_output_and_nowhere_else(trusted_run: Any) -> None:
    root = f"{trusted_run.outcome.run}/"
    assert [uri for uri in trusted_run.objects if not uri.startswith(root)] == []
    assert trusted_run.new_files == set()
    names = [uri.removeprefix(root) for uri in trusted_run.objects]
    drawn = [name for name in names if name.startswith(("overlays/", "crops/"))]
    plain = re.compile(r"overlays/\d+\.jpg|crops/[A-Za-z0-9_-]+/\d+_\d+\.jpg")
    assert [name for name in drawn if not plain.fullmatch(name)] == []
    assert sum(name.startswith("overlays/") for name in drawn) == len(trusted_run.wanted)
    assert sum(name.startswith("crops/") for name in drawn) > 0


def test_run_inference_writes_no_secret_into_its_files(
    trusted_run: Any, s3_server: EmbeddedS3
) -> None:
    assert f"{trusted_run.outcome.run}/run.json" in trusted_run.objects
    for secret in [*_secrets(s3_server), s3_server.access_key]:
        holders = [uri for uri, data in trusted_run.objects.items() if secret.encode() in data]
        assert holders == []


def test_run_inference_logs_no_secret_when_verbose(
    trusted_run: Any, s3_server: EmbeddedS3, ray_logs: Callable[[], dict[str, bytes]]
) -> None:
    assert "parts to do" in trusted_run.log
    logs = ray_logs()
    assert any(name.startswith("worker-") for name in logs)
    for secret in [*_secrets(s3_server), s3_server.access_key]:
        assert secret not in trusted_run.log
        assert [name for name, data in logs.items() if secret.encode() in data] == []


def test_run_inference_shows_no_secret_in_the_process_list(
    trusted_run: Any, s3_server: EmbeddedS3
) -> None:
    watch = trusted_run.watch
    # The workers were seen, and did hold the secret where it belongs.
    assert any(line.startswith("ray::") for line in watch.command_lines)
    assert any(s3_server.secret_key in text for text in watch.environments)
    for secret in [*_secrets(s3_server), s3_server.access_key]:
        assert [line for line in watch.command_lines if secret in line] == []


def test_run_inference_puts_no_secret_into_a_runtime_environment(
    trusted_run: Any, s3_server: EmbeddedS3
) -> None:
    import ray

    context = ray.get_runtime_context()
    shown = repr([context.runtime_env, context.get_runtime_env_string()])
    assert s3_server.secret_key not in shown
    assert "AWS_" not in shown
