r"""Search anchors and other settings with Ray Tune, by validation AP.

On a cluster, from the repository root:
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/tune.py /mnt/shared/sweep \
            --config jobs/configs/tune_anchors.yaml --trials 32 --workers 2

On this machine:
    python jobs/tune.py sweep --config jobs/configs/tune_anchors.yaml

Same as `retinaray tune`; `--help` lists every setting. The last line of stdout is one JSON
object. A new script here must not be named after a package that is imported: this folder is first
on the import path.
"""

import sys
from pathlib import Path

# The package as it lies beside this folder, which is what `--working-dir .` brings to a cluster.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from retinaray.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("tune", sys.argv[1:]))
