"""ray_cluster.yaml is what `ray up` accepts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER_FILE = Path(__file__).parents[2] / "ray_cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER_FILE.read_text(encoding="utf-8"))
    return loaded


def test_cluster_file_passes_rays_own_preparation(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"


def test_cluster_file_is_refused_with_a_misspelt_key(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu_spot"]["max_worker"] = 1
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(cluster))


def test_cluster_file_starts_ray_with_a_token_and_a_private_dashboard(
    cluster: dict[str, Any],
) -> None:
    (start,) = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]
    # All commands of a node find the token by the same settings.
    assert start.startswith(". ~/retinaray/cluster/node_env.sh &&")
    settings = (CLUSTER_FILE.parent / "cluster" / "node_env.sh").read_text(encoding="utf-8")
    assert "export RAY_AUTH_MODE=token" in settings.splitlines()
    assert "--dashboard-host=127.0.0.1" in start
