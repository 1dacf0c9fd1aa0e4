"""What every verb shares: errors become exit codes, and the two voices: a card on stderr, a JSON line on stdout."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import click

from ..core.errors import OnecardError, ResourceError
from ..core.json_text import json_text
from ..core.libraries import quiet_libraries, quiet_loaded_libraries
from .options import refuse_early


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def print_line(text: str) -> None:
    """Prints a line on stdout. Raises ResourceError when it cannot be written."""
    try:
        click.echo(text)
    except OSError as error:
        # The interpreter flushes stdout once more when it ends; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ResourceError(
            f"standard output could not be written ({error.strerror}). The files that the command wrote are complete"
        ) from error


def print_json(value: Mapping[str, Any]) -> None:
    """Prints a verb's JSON line on stdout. Raises NonfiniteError for a figure that JSON cannot hold, ResourceError as
    `print_line` does."""
    print_line(json_text(value))


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turns an OnecardError into a message and its exit code. Any other exception is a bug and keeps its traceback."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, _stop)  # schedulers send it in place of Ctrl-C
            quiet_libraries()
            quiet_loaded_libraries()
            refuse_early(click.get_current_context())
            function(*args, **kwargs)
        except OnecardError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped.", err=True)
            sys.exit(130)
        except (MemoryError, RuntimeError) as error:  # torch raises its own as RuntimeErrors
            if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            first = str(error).partition("\n")[0]
            click.echo(
                f"error: memory ran out ({first}). Finished work is kept: with more memory, continue with --resume. A "
                "recipe with `output_blocks: 0` or a smaller `batch_tokens` needs less memory, but is another "
                "recipe: start it with --overwrite",
                err=True,
            )
            sys.exit(ResourceError.exit_code)

    return run


def make_console() -> Any:
    """The console for people, on stderr."""
    from rich.console import Console

    # A name of a folder may hold brackets: rich must not read them as markup.
    console = Console(file=sys.stderr, markup=False, emoji=False)
    # A log or a pipe has no width; 110 columns hold every line of the card.
    return console if console.is_terminal else Console(file=sys.stderr, width=110, markup=False, emoji=False)
