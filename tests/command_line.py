"""The command line in this process: how tests call it, and what they require of its output and refusals."""

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from onecard.cli import main

Command = Callable[..., Result]
Refuse = Callable[..., str]
FAMILIES = ["scout", "maverick", "llama4-text", "qwen3"]
PROMISED = {
    "out",
    "emitted_bytes",
    "bits_per_weight",
    "kl_mean_nats",
    "kl_p99_nats",
    "same_top1",
    "tokens",
    "seconds",
    "peak_rss_bytes",
}


def run_onecard(*args: object) -> Result:
    """The real command line, in this process: exit code, stdout and stderr as a shell would see them."""
    return CliRunner().invoke(main, [str(a) for a in args])


def strict(text: str) -> Any:
    """JSON as other programs read it: NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def one_line(result: Result) -> dict[str, Any]:
    """The one JSON line on stdout of a command that ended well."""
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert result.stdout.count("\n") == 1
    assert result.stdout.endswith("}\n")
    return dict(strict(result.stdout))


def refused(result: Result, *needles: object, code: int = 2) -> str:
    """Asserts one clean message that holds every needle, and the exit code; gives what stderr said."""
    shown = "".join(traceback.format_exception(result.exception)) if result.exception else result.output
    assert isinstance(result.exception, SystemExit), shown
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert [line[:7] for line in result.stderr.splitlines()].count("error: ") == 1, result.stderr
    assert "Traceback" not in result.stderr
    missing = [str(n) for n in needles if str(n) not in result.stderr]
    assert not missing, (missing, result.stderr)
    return result.stderr


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every path under a folder with its size and time. Two equal listings mean that nothing was written."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (s.st_size, s.st_mtime_ns) for path, s in stats.items()}
