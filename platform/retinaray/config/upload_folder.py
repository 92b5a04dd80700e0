"""Whether what a job writes outlives it: Ray removes the folder that it uploaded for a job."""

from __future__ import annotations

from pathlib import Path

from retinaray.config.nodes import Job
from retinaray.errors import ConfigError

# The folders in which Ray's runtime environment unpacks `--working-dir`, on every node.
_MARKS = ("runtime_resources", "working_dir_files")


def check_output_stays(job: Job, folder: Path) -> None:
    """Refuse an output inside the uploaded copy of a working directory.

    Args:
        job: The job; jobs without an `output`, or with none given, pass.
        folder: Current folder of the process, absolute.

    Raises:
        ConfigError: If the output would be removed with the copy.
    """
    output = getattr(job, "output", None)
    if not isinstance(output, str) or output.startswith("s3://"):
        return
    path = (folder / Path(output.removeprefix("file://")).expanduser()).resolve()
    marks = [index for index in range(len(path.parts) - 1) if path.parts[index:][:2] == _MARKS]
    if marks:
        raise ConfigError(
            f"output={output}: lies in the copy of --working-dir that Ray unpacked for this job on "
            "one node, and removes after it; give an absolute path in a folder that all nodes "
            "mount, or s3:// where the command writes there"
        )
