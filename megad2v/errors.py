"""Errors that a person can mend. Command lines print the message as one line and exit with `exit_code`."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong: the message names the key, file or sample, what was expected, and how to mend it."""

    exit_code = 2
    on_one_rank = False
    """Set where only this rank of a run can know of it, so it has to say so itself."""


class BadNumericState(Exception):
    """The run stopped because going on would waste time or do damage; its state is saved. Raised alike on every rank:
    the message says which quantity, since when, what was saved and what to try."""

    exit_code = 3
    on_one_rank = False
