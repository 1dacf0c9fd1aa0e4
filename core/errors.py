"""Errors that are the user's to mend, each with its exit code.

An OnecardError ends a command with one clean message and its exit code; anything else that escapes is a bug of ours
and keeps its traceback. The codes are part of the interface (README, 'Exit codes').
"""

from collections.abc import Iterable


class OnecardError(Exception):
    """A failure that the user can act upon. `exit_code` ends the process."""

    exit_code = 1


class LimitError(OnecardError):
    """A limit of the recipe was exceeded (coverage, fallbacks, KL): the run was sound, its result is not wanted."""

    exit_code = 1


class DamageError(OnecardError):
    """A checkpoint is not what its own papers say: its digests, its record, its config, or its numbers."""

    exit_code = 1


class InputError(OnecardError):
    """What was given cannot be used: model, recipe, texts or paths. Nothing was written."""

    exit_code = 2


class FitError(OnecardError):
    """The plan does not fit the card. The plan itself was made and printed; the message says what would fit."""

    exit_code = 3


class ResourceError(OnecardError):
    """The machine gave out (disk, memory, network). What was finished is kept; the message says how to go on."""

    exit_code = 4


def input_error(headline: str, problems: Iterable[str], way_out: str) -> InputError:
    """One message that lists every offender and ends with the way out."""
    lines = [headline, *(f"  - {problem}" for problem in problems), way_out]
    return InputError("\n".join(lines))
