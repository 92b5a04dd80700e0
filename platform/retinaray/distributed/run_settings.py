"""Whether a job may go on with the run that lies in its folder: what differs, in words."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from retinaray.config.nodes import ClusterConfig

# Free in every run; as a whole too, because older records do not have them.
CLUSTER_SETTINGS = ("cluster", *(f"cluster.{name}" for name in ClusterConfig.model_fields))

# Where training images are kept on their way changes no batch; older records do not have it.
CACHE_SETTINGS = ("data.cache", "data.cache_gb", "data.cache_decoded", "data.cache_recheck_s")


def compare_settings(
    old: Mapping[str, Any], new: Mapping[str, Any], *, free: Collection[str], path: str = ""
) -> list[str]:
    """Settings that differ, as `path: old -> new`, sorted by path.

    Args:
        old: Settings of the run that is there, as plain values.
        new: Those of the job.
        free: Dotted paths that may differ, because they do not change what is computed.
        path: Dotted path of both, with its dot at the end; empty at the root.
    """
    differences: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences += compare_settings(before, after, free=free, path=f"{path}{key}.")
        # As JSON, because a tuple comes back from a file as a list.
        elif json.dumps(before) != json.dumps(after) and path + key not in free:
            differences.append(f"{path}{key}: {before} -> {after}")
    return differences
