"""What every verb shares: errors become exit codes, and the two voices: a card on stderr, a JSON line on stdout."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from ..core.errors import OnecardError, ResourceError
from ..core.libraries import quiet_libraries
from .options import refuse_early


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def print_line(text: str) -> None:
    """A line on stdout."""
    try:
        click.echo(text)
    except OSError as error:
        # Nothing more is tried when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ResourceError(
            f"standard output could not be written ({error.strerror}). What the command put into files is whole"
        ) from error


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Errors of the user's become one message and their exit code; anything else is a bug and keeps its traceback."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, _stop)  # a scheduler's way to say Ctrl-C
            quiet_libraries()
            refuse_early(click.get_current_context())
            function(*args, **kwargs)
        except OnecardError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped.", err=True)
            sys.exit(130)
        except (MemoryError, RuntimeError) as error:  # torch's own kinds are RuntimeErrors
            if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            first = str(error).partition("\n")[0]
            click.echo(
                f"error: memory ran out ({first}). What is finished is kept. A recipe with `output_blocks: 0` or a "
                "smaller `batch_tokens` needs less (it is another recipe: --overwrite); with more memory go on with "
                "--resume",
                err=True,
            )
            sys.exit(ResourceError.exit_code)

    return run


def make_console() -> Any:
    from rich.console import Console

    # Names of folders and recipes are no markup.
    console = Console(file=sys.stderr, markup=False, emoji=False)
    # A log or a pipe has no width of its own: 110 columns hold every line of the card.
    return console if console.is_terminal else Console(file=sys.stderr, width=110, markup=False, emoji=False)
