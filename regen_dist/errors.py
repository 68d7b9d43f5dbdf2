"""One family of errors. Each carries the exit code that the command line ends with; README.md lists the codes."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class RegenError(Exception):
    """Error that a user can fix. The message says what was asked, what was found, what is allowed, and the remedy."""

    exit_code = 1


class ConfigError(RegenError):
    """A config file or an override is wrong. All problems of a config are gathered into one error."""

    exit_code = 2


class DataError(RegenError):
    """A video, a shard or an index cannot be used as it is."""

    exit_code = 3


class ObjectMissing(DataError):
    """No such object, or no such bucket, in the object store."""


class BucketMissing(ObjectMissing):
    """No such bucket in the object store."""


class ObjectCut(DataError):
    """An object is shorter than the range that was asked of it."""

    @classmethod
    def at(cls, where: str, offset: int, size: int, found: int) -> ObjectCut:
        """Return the error for `found` instead of `size` bytes at an offset of the object at the URL `where`."""
        return cls(
            f"{where}: asked for {size} bytes at {offset}, got {found}; the object is cut: run `regen shards verify` "
            "and build the shard again"
        )


class AccessDenied(DataError):
    """The store does not know this user, or does not allow the operation; or there are no credentials."""


class ObjectDenied(AccessDenied):
    """The store knows this user, and does not allow the operation on this object."""


class StoreUnavailable(DataError):
    """The store gave no usable answer until the deadline passed."""


class DiskFull(DataError):
    """The disk has no room for what is being written."""


class CheckpointError(RegenError):
    """A checkpoint is missing, incomplete, damaged, or does not belong to this config."""

    exit_code = 4


class NoGoodCheckpoint(CheckpointError):
    """Not one of the checkpoints can be used; or they are lost."""


class BackendError(RegenError):
    """An accelerator, kernel or package was asked for that cannot run here."""

    exit_code = 5


class TrainingError(RegenError):
    """The run itself went wrong: too many non-finite steps, ranks that disagree."""

    exit_code = 6


class HangError(RegenError):
    """A rank made no progress for longer than `guards.hang` allows."""

    exit_code = 7


class RunBusy(RegenError):
    """Another live process trains the same run."""

    exit_code = 8


EXTRAS = {  # optional packages by the name that is imported: the extra of pyproject.toml that brings each
    "PIL": "video",
    "av": "video",
    "cv2": "video",
    "diffusers": "hub",
    "gradio": "app",
    "huggingface_hub": "text",
    "imageio_ffmpeg": "eval",
    "matplotlib": "eval",
    "obstore": "data",
    "pyarrow": "data",
    "scenedetect": "video",
    "sentencepiece": "text",
    "tensorboard": "track",
    "transformers": "text",
    "wandb": "track",
}


@contextmanager
def needing_extra(user: str) -> Iterator[None]:
    """Report a missing optional package (`EXTRAS`) with the command that installs it.

    Args:
        user: the command, key or measure that needs the package.

    Raises:
        BackendError: an import inside the block found that the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise BackendError(missing_extra(user, package)) from error


def missing_extra(user: str, package: str) -> str:
    """Return the message for a missing package of `EXTRAS`."""
    return f"{user} needs {package}, which is not installed; run: pip install 'regen-dist[{EXTRAS[package]}]'"


EXIT_OK = 0
EXIT_RESUME = 75  # stopped early with everything saved: run the same command again (EX_TEMPFAIL of sysexits.h)


@contextmanager
def errors_in_one_line(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """End a command with one message on stderr and an exit code: that of a RegenError, or 2 where a file or folder
    refuses. Any other error keeps its traceback, and with REGEN_DEBUG=1 all do."""
    try:
        with needing_extra(_command()):
            yield
    except (RegenError, OSError) as error:
        message = str(error) if isinstance(error, RegenError) else refusal(error)
        if message is None or environment.get("REGEN_DEBUG") == "1":
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", ConfigError.exit_code)) from None


def _command() -> str:
    """Return the command of `regen` that runs, without its arguments."""
    return f"`regen {next((word for word in sys.argv[1:] if not word.startswith('-')), '')}`"


def refusal(error: OSError) -> str | None:
    """Describe a disk's refusal and its remedy; None if the error is of another kind."""
    if isinstance(error, shutil.Error) and error.args and error.args[0]:  # a list of (from, to, why)
        _, target, why = error.args[0][0]
        return f"{target} cannot be written: {why}; {_ROOM}, or name another place"
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    if error.errno == errno.ENOENT and not error.filename and os.stat(".").st_nlink == 0:  # of os.getcwd
        return "the current folder was deleted; go to another (`cd`), and run the same again"
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return f"{where}{error.strerror}; {remedy}"


_ROOM = "make room on that disk, and run the same again"
_ELSEWHERE = "check its owner, its mode and how its disk is mounted, or name another place"
_NAME = "name another place"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _ELSEWHERE),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), _NAME),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO), "does that disk answer?"),
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
}
