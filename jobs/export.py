r"""Write a trained model as one portable ONNX file and check it box by box.

On a cluster, from the repository root:
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/export.py /mnt/shared/cells.pth /mnt/shared/cells.onnx

On this machine:
    python jobs/export.py cells.pth cells.onnx --size 480 640

Same as `retinaray export`; `--help` lists every setting. The last line of stdout is one JSON
object. A new script here must not be named after a package that is imported: this folder is first
on the import path.
"""

import sys
from pathlib import Path

# The package as it lies beside this folder, which is what `--working-dir .` brings to a cluster.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from retinaray.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("export", sys.argv[1:]))
