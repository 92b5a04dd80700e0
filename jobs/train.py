r"""Train a RetinaNet with Ray Train and keep the best weights.

On a cluster, from the repository root:
    ray job submit --address http://HEAD:8265 --working-dir . \
        --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \
        python jobs/train.py /mnt/shared/cells.pth \
            --config jobs/configs/train_bccd.yaml --workers 4 --batch 32

On this machine:
    PYTHONPATH=platform python jobs/train.py cells.pth --config jobs/configs/train_bccd.yaml

Same as `retinaray train`; `--help` lists every setting. The last line of stdout is one JSON
object. A new script here must not be named after a package that is imported: this folder is first
on the import path.
"""

import sys

from retinaray.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("train", sys.argv[1:]))
