"""The errors that end a program, each with the exit code that a launcher reads.

Codes 42 and 127-255 ask for a restart. After the others a restart would fail the same way.
"""

import errno

EXIT_PREEMPTED = 42
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)  # files, memory or processes that the system refuses


class RunError(Exception):
    """An error that ends a program with one line on stderr and its own exit code."""

    exit_code = 1


class InputError(RunError):
    """An error in what was given. It may quote names that lie in a file, with line breaks and codes of a terminal."""

    def __str__(self) -> str:
        """What is wrong, on one line."""
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())


class ConfigError(InputError, ValueError):
    """A config, flag, or working directory that cannot be used."""

    exit_code = 78


class DataError(InputError):
    """Training data that is missing or damaged."""

    exit_code = 65


class WeightsError(InputError):
    """A file of weights that is missing, damaged, or holds more than weights."""

    exit_code = 65  # as for data: the input is wrong. 74 is for our own checkpoints, which the disk may have damaged.


class MachineError(RunError):
    """The machine lacks memory, threads or open files. No file is to blame."""

    exit_code = 71


class NonFiniteError(RunError):
    """A loss or gradient became NaN or infinite."""

    exit_code = 70


class StorageError(RunError):
    """A file that cannot be read or written: there is no permission, the disk is full, the mount fails."""

    exit_code = 74


class CheckpointError(RunError):
    """A checkpoint that cannot be written, read, or fitted to the model."""

    exit_code = 74


class UnfitCheckpointError(CheckpointError):
    """A whole checkpoint of another config or a newer version. The disk is not to blame."""

    exit_code = 78


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that does not hold what was saved. An older one may be whole. problem: without the remedy."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem}. {remedy}")
        self.problem = problem


def check_machine(error: BaseException) -> None:
    """Raise MachineError if it is the machine that fails. For readers that take every other error for damage."""
    if isinstance(error, MachineError):
        raise error
    lacking = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in LACKING)
    text = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
    if lacking or "can't start new thread" in text:
        raise MachineError(f"the machine lacks memory, threads or open files: {text}") from error
