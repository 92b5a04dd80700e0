"""Batch inference as Ray Data's documents do it, with torchvision's RetinaNet; not a case."""

from __future__ import annotations

import io
import json
import os
import time
from typing import Any

import numpy as np
import torch

from retinaray.storage import Storage

THREADS = 2
BATCH = 8


class TorchvisionDetector:
    """torchvision's RetinaNet as its users call it."""

    def __init__(self, side_px: int, threads: int) -> None:
        from torchvision.models.detection import RetinaNet
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        torch.set_num_threads(threads)
        backbone = resnet_fpn_backbone(
            backbone_name="resnet18",
            weights=None,
            trainable_layers=5,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )
        self._model = RetinaNet(backbone, 4, min_size=side_px, max_size=side_px).eval()
        self._began = time.time()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Detections of some images, and when this model was ready."""
        images = [torch.from_numpy(image).permute(2, 0, 1) / 255 for image in batch["image"]]
        with torch.inference_mode():
            found = self._model(images)
        return {
            "boxes": [item["boxes"].flatten().tolist() for item in found],
            "scores": [item["scores"].tolist() for item in found],
            "labels": [item["labels"].tolist() for item in found],
            "began": [self._began] * len(found),
        }


def run_example(images: str, root: str, num_images: int, side_px: int) -> dict[str, float]:
    """Ray Data's example over some images of an S3 prefix; the seconds begin with its model."""
    import ray
    from pyarrow import fs
    from ray.data import ActorPoolStrategy

    s3 = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])
    output = f"{root}/peer-{time.time_ns()}"
    ray.data.read_images(
        images.removeprefix("s3://"), filesystem=s3, mode="RGB", size=(side_px, side_px)
    ).map_batches(
        TorchvisionDetector,
        fn_constructor_kwargs={"side_px": side_px, "threads": THREADS},
        batch_size=BATCH,
        compute=ActorPoolStrategy(size=1),
        num_cpus=1,
    ).write_json(output.removeprefix("s3://"), filesystem=s3)
    end = time.time()
    storage = Storage()
    rows = [
        json.loads(line)
        for uri in storage.list_files(output)
        for line in io.BytesIO(storage.read_bytes(uri))
    ]
    assert len(rows) == num_images
    return {"seconds": end - min(row["began"] for row in rows)}
