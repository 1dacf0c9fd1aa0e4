"""Errors that the user can mend, each with its exit code.

An OnecardError ends a command with one message and its exit code. Any other exception is a bug and keeps its traceback.
The codes are part of the interface (cli.py lists them).
"""

from collections.abc import Iterable


class OnecardError(Exception):
    """A failure that the user can mend. A command ends with `exit_code`."""

    exit_code = 1


class LimitError(OnecardError):
    """The run worked, but its result breaks a limit of the recipe (KL, flips, size, coverage, fallbacks)."""

    exit_code = 1


class DamageError(OnecardError):
    """A checkpoint contradicts its own digests, record or config, or holds numbers that are not finite."""

    exit_code = 1


class NonfiniteError(OnecardError):
    """A number that is computed from a checkpoint, or from its quantization, is NaN or infinite. Finished work is kept.

    Where the original itself gives such numbers, the model cannot be used: that is an InputError.
    """

    exit_code = 1


class InputError(OnecardError):
    """The model, recipe, texts or paths that were given cannot be used. Nothing was written."""

    exit_code = 2


class UnreadError(InputError):
    """The weights are sound, and stored in a way that onecard does not read."""


class UnusableModelError(InputError):
    """The original's own weights, hidden rows, logits or moments are not finite. A run leaves nothing behind, wherever
    it finds it."""


class FitError(OnecardError):
    """The checkpoint would not fit the card. `onecard plan` still prints the plan; the message says what fits."""

    exit_code = 3


class ResourceError(OnecardError):
    """Disk, memory or network failed. What is finished is kept; the message says how to go on."""

    exit_code = 4


def several(headline: str, problems: Iterable[str], way_out: str, most: int | None = None) -> str:
    """One message: the headline, every problem on its line (the first `most`), and what the user can do."""
    found = list(problems)
    shown = found[:most]
    if len(shown) < len(found):
        shown.append(f"... and {len(found) - len(shown)} more")
    return "\n".join([headline, *(f"  - {problem}" for problem in shown), way_out])


def input_error(headline: str, problems: Iterable[str], way_out: str, most: int | None = None) -> InputError:
    """An InputError with the message that `several` makes."""
    return InputError(several(headline, problems, way_out, most))
