r"""Run a model over very many images with Ray Data and write COCO detections.

On a cluster, from the repository root:
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/infer.py --config jobs/configs/infer_s3.yaml --workers 16

On this machine:
    python jobs/infer.py model.onnx --images photos --output detections.json

Same as `retinaray infer`; `--help` lists every setting. The last line of stdout is one JSON
object. A new script here must not be named after a package that is imported: this folder is first
on the import path.
"""

import sys
from pathlib import Path

# The package as it lies beside this folder, which is what `--working-dir .` brings to a cluster.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from retinaray.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("infer", sys.argv[1:]))
