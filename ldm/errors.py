"""The errors a user can meet, each with the exit code that main.py and the scripts end with.

Raise one of these for anything the user can fix, with a message that names the file, the key, what was
expected, what was found, and what to do. Anything else that escapes is a bug and keeps its traceback.

| code | class | meaning |
| 0 | - | done |
| 2 | ConfigError | the YAML, an override or a flag |
| 3 | DataError | images, labels or the latent cache |
| 4 | CheckpointError | no checkpoint, or none that can be trusted |
| 5 | NumericError | a non-finite loss or gradient |
| 6 | ResourceError | disk, memory, permissions |
| 7 | PeerError | another rank died or timed out |
| 8 | LockError | another run owns the folder |
| 128+n | - | stopped by signal n after a good save |
"""

import errno
import os


class LdmError(Exception):
    """Base of every error that the user can fix; printed as one message without a traceback."""

    exit_code = 1


class ConfigError(LdmError):
    """The configuration cannot be run as written."""

    exit_code = 2


class DataError(LdmError):
    """Images, labels or a latent cache are missing, broken, stale or foreign."""

    exit_code = 3


class CheckpointError(LdmError):
    """A checkpoint is missing, damaged or of another kind."""

    exit_code = 4


class NumericError(LdmError):
    """A loss, gradient or weight is not finite."""

    exit_code = 5


class ResourceError(LdmError):
    """The machine lacks something: disk space, permission, memory."""

    exit_code = 6


class PeerError(LdmError):
    """Another rank died or did not answer in time."""

    exit_code = 7


class LockError(LdmError):
    """Another living process owns the run folder or the cache."""

    exit_code = 8


_WRONG_KIND = {
    errno.EEXIST: "there is a file where a folder is needed",
    errno.ENOTDIR: "there is a file where a folder is needed",
    errno.EISDIR: "there is a folder where a file is needed",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def of_place(error: OSError) -> ResourceError | None:
    """What an OSError says of the place that something should be written to; None where it is of another kind."""
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else "a file"
    if error.errno in _WRONG_KIND:
        return ResourceError(f"{place}: {_WRONG_KIND[error.errno]}. Name another place, or move what is there.")
    if error.errno in _NO_ROOM:
        return ResourceError(f"{place}: {error.strerror}. Make room, or permit writing there.")
    return None
