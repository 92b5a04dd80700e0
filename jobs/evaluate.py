r"""Score a model, or a detections file, against ground truth.

On a cluster, from the repository root:
    ray job submit --address http://HEAD:8265 --working-dir . \
        --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \
        python jobs/evaluate.py /mnt/shared/cells.onnx \
            --images s3://bucket/test/ --annotations /mnt/shared/test.json

On this machine:
    PYTHONPATH=platform python jobs/evaluate.py cells.pth \
        --images data/test --annotations data/test.json

Same as `retinaray evaluate`; `--help` lists every setting. The last line of stdout is one JSON
object. A new script here must not be named after a package that is imported: this folder is first
on the import path.
"""

import sys

from retinaray.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("evaluate", sys.argv[1:]))
