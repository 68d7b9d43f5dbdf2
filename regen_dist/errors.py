"""One family of errors. Each carries the exit code that the command line ends with; README.md lists the codes."""

from __future__ import annotations


class RegenError(Exception):
    """What a user can mend. The message says what was asked, what was found, what is allowed, and how to mend it."""

    exit_code = 1


class ConfigError(RegenError):
    """A config file or an override is wrong. All problems of a config are gathered into one error."""

    exit_code = 2


class DataError(RegenError):
    """A video, a shard or an index cannot be used as it is."""

    exit_code = 3


class ObjectMissing(DataError):
    """There is no such object, or no such bucket."""


class BucketMissing(ObjectMissing):
    """There is no such bucket."""


class ObjectCut(DataError):
    """An object is shorter than the range that was asked of it."""


class AccessDenied(DataError):
    """The store knows no such user, or does not let this one do it; or there are no credentials."""


class ObjectDenied(AccessDenied):
    """The store knows this user, and does not let it do this with this object."""


class StoreUnavailable(DataError):
    """The store gave no usable answer until the deadline passed."""


class DiskFull(DataError):
    """The disk has no room for what is being written."""


class CheckpointError(RegenError):
    """A checkpoint is missing, incomplete, damaged, or does not belong to this config."""

    exit_code = 4


class BackendError(RegenError):
    """An accelerator, kernel or package was asked for that cannot run here."""

    exit_code = 5


class TrainingError(RegenError):
    """The run itself went wrong: too many non-finite steps, ranks that disagree."""

    exit_code = 6


class HangError(RegenError):
    """A rank stood still for longer than `guards.hang` allows."""

    exit_code = 7


class RunBusy(RegenError):
    """Another process, which lives, trains the same run."""

    exit_code = 8


EXIT_OK = 0
EXIT_RESUME = 75  # stopped early with everything saved: run the same command again (EX_TEMPFAIL of sysexits.h)
