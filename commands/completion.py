"""`onecard completion`: the script that lets a shell complete verbs, options and their values."""

import click
from click.shell_completion import get_completion_class

from .shared import print_line, verb

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@verb
def completion(shell: str) -> None:
    """Print the completion script for SHELL. docs/completion.md says where it goes.

    \b
    Example:
      onecard completion bash > ~/.local/share/bash-completion/completions/onecard
    """
    script = get_completion_class(shell)
    assert script is not None, shell
    root = click.get_current_context().find_root().command
    print_line(script(root, {}, "onecard", "_ONECARD_COMPLETE").source().rstrip())
