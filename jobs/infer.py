r"""Run a model over very many images with Ray Data and write COCO detections.

On a cluster, from the repository root:
    ray job submit --address http://HEAD:8265 --working-dir . \
        --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \
        python jobs/infer.py --config jobs/configs/infer_s3.yaml --workers 16

On this machine:
    PYTHONPATH=platform python jobs/infer.py model.onnx --images photos --output detections.json

Same as `retinaray infer`; `--help` lists every setting. The last line of stdout is one JSON
object. A new script here must not be named after a package that is imported: this folder is first
on the import path.
"""

import sys

from retinaray.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("infer", sys.argv[1:]))
