"""Errors that a person can mend. Command lines print the message as one line and exit with `exit_code`."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong: the message names the key, file or sample, what was expected, and how to mend it."""

    exit_code = 2
    on_one_rank = False
    """Set where only this rank of a run can know of it, so it has to say so itself."""


class LogError(UserError):
    """A rank could not write its logs: a full disk, a quota. The run ends, on this rank first; checkpoints stay."""

    exit_code = 1
    on_one_rank = True


class BadNumericState(Exception):
    """The run stopped because going on would waste time or do damage; its state is saved. Raised alike on every rank:
    the message says which quantity, since when, what was saved and what to try."""

    exit_code = 3
    on_one_rank = False


class Preempted(BaseException):
    """The run was asked to stop (a signal, train.max_minutes) and can be started again: exit code 75. Like
    KeyboardInterrupt it passes through `except Exception`: during start-up a signal raises it anywhere."""

    exit_code = 75

    def __init__(self, message: str, *, on_one_rank: bool = False) -> None:
        super().__init__(message)
        self.on_one_rank = on_one_rank
        """Raised by a signal on this rank alone, or raised alike on every rank."""
