"""What retinaray raises for a user to read: one tree, each class safe to send between processes.

A message says what was expected, what came, where, and what to do. Callers' programming mistakes
are `ValueError`/`TypeError`, not these.
"""


class RetinarayError(Exception):
    """Root of every error that a command shows as one line instead of a traceback."""


class ConfigError(RetinarayError):
    """The job's settings are wrong; the message lists every fault at once."""


class DatasetError(RetinarayError):
    """An annotation file or its image folder cannot be used as it is."""


class ImageError(RetinarayError):
    """One image cannot be decoded; the run goes on without it."""


class CheckpointError(RetinarayError):
    """A weights or checkpoint file is missing, truncated, foreign or of another architecture."""


class DivergenceError(RetinarayError):
    """A training has no finite gradients any more; the message names the last images."""


class ExportError(RetinarayError):
    """A model could not be exported, or an exported file does not keep its contract."""


class InferenceError(RetinarayError):
    """A backend cannot run here, or refuses the model file."""


class ClusterError(RetinarayError):
    """Ray cannot be reached, is too small for the job, or lost the job."""


class StorageError(RetinarayError):
    """A local or S3 location cannot be read or written."""


class UnreadableFileError(StorageError):
    """This one file cannot be had, however often it is asked for: forbidden, a folder, absent."""


class MissingFileError(UnreadableFileError):
    """The file is not there; its bucket, if it has one, is."""
