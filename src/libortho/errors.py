"""The errors of this package that are more than a bad argument."""


class LibOrthoError(Exception):
    """Base class of the errors below."""


class OrthoStreamMissing(LibOrthoError, RuntimeError):
    """alpha > 0 was asked of a layer whose ortho stream is not there (a base-only deployment)."""


class CheckpointError(LibOrthoError, ValueError):
    """A checkpoint that cannot be trusted: missing, truncated, or not of one piece."""


class OrthoLocked(CheckpointError, OrthoStreamMissing):
    """An ortho stream is encrypted, and no key was given."""


class DataError(LibOrthoError, ValueError):
    """A data file that cannot be read as asked; the message names the file and the line."""
