r"""Score a model, or a detections file, against ground truth.

On a cluster, from the repository root:
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/evaluate.py /mnt/shared/cells.onnx \
            --images s3://bucket/test/ --annotations /mnt/shared/test.json

On this machine:
    python jobs/evaluate.py cells.pth \
        --images data/test --annotations data/test.json

Same as `retinaray evaluate`; `--help` lists every setting. The last line of stdout is one JSON
object. A new script here must not be named after a package that is imported: this folder is first
on the import path.
"""

import sys
from pathlib import Path

# The package as it lies beside this folder, which is what `--working-dir .` brings to a cluster.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from retinaray.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("evaluate", sys.argv[1:]))
