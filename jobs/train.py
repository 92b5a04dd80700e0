r"""Train a RetinaNet with Ray Train and keep the best weights.

On a cluster, from the repository root:
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/train.py /mnt/shared/cells.pth \
            --config jobs/configs/train/bccd_resnet18.yaml --workers 4 --batch 32

On this machine:
    python jobs/train.py cells.pth --config jobs/configs/train/bccd_resnet18.yaml

Same as `retinaray train`; `--help` lists every setting. The last line of stdout is one JSON
object. A new script here must not be named after a package that is imported: this folder is first
on the import path.
"""

import sys
from pathlib import Path

# The package as it lies beside this folder, which is what `--working-dir .` brings to a cluster.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from retinaray.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("train", sys.argv[1:]))
