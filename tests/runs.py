"""One `quantize` command that tests stop, kill and resume, and what its folders hold.

A run counts its steps as `WorkDir.commit` does: `STAGES` of them, the last two are the move to OUT and verification.
"""

import datetime
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from command_line import run_onecard
from onecard.checkpoint.workdir import WorkDir

Contents = dict[str, Any]
FAMILY = "qwen3"  # the quickest baby


def contents(folder: Path) -> Contents:
    """Every file of a folder with its bytes, without the record's `machine` and its line in SHA256SUMS, which may
    differ."""
    found: Contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "onecard.json" in found:
        found["onecard.json"] = {k: v for k, v in json.loads(found["onecard.json"]).items() if k != "machine"}
    if "SHA256SUMS" in found:
        found["SHA256SUMS"] = [line for line in found["SHA256SUMS"].splitlines() if not line.endswith(b"onecard.json")]
    return found


def differences(left: Contents, right: Contents) -> list[str]:
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


class Stopped(BaseException):
    """Ends a run as a kill would; nothing may catch it."""


class Run:
    """One quantize command on a baby, for a test to stop and resume."""

    def __init__(self, model: Path, out: Path, recipe: Path, texts: list[str]) -> None:
        self.model, self.out, self.recipe, self.texts = model, out, recipe, texts
        self.work = out.with_name(out.name + ".work")

    def __call__(self, *flags: object, recipe: Path | None = None, out: Path | None = None) -> Result:
        return run_onecard(
            "quantize", self.model, out or self.out, "--recipe", recipe or self.recipe, *self.texts, *flags
        )

    def stopped_at(self, stages: int, *flags: object, committed: bool = False) -> None:
        """Runs until `stages` steps are done and all their files are written, then stops before the commit, or after it
        with `committed`."""
        real = WorkDir.commit

        def commit(workdir: WorkDir, done: int) -> None:
            if done < stages or committed:
                real(workdir, done)
            if done == stages:
                raise Stopped

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WorkDir, "commit", commit)
            with pytest.raises(Stopped):
                self(*flags)

    def resumed(self) -> Contents:
        result = self("--resume")
        assert result.exit_code == 0, result.output + repr(result.exception)
        assert not self.work.exists()
        return contents(self.out)


def assert_whole_or_no_checkpoint(out: Path, *wholes: Contents) -> None:
    """Invariant 9: an unfinished folder cannot be loaded."""
    if (out / "config.json").exists():
        found = contents(out)
        assert any(not differences(found, one) for one in wholes), [differences(found, one) for one in wholes]


# --- killed and resumed


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked process and give the signal that ended it, or minus its exit code."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.alarm(300)  # a child that hangs must not hang the tests
            torch.set_num_threads(1)
            result = action()
            code = result.exit_code if isinstance(result, Result) else 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


STAGES = 5  # the rest and embed, two blocks, move, verify


@contextmanager
def stopped_after_removals(number: int) -> Iterator[list[str]]:
    """Stops at the removal of a file or folder with this number, as a kill during rmtree would. The yielded list is
    empty if there were fewer removals."""
    seen, stopped = [0], []

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def remove(*args: Any, **kwargs: Any) -> None:
            if seen[0] == number:
                stopped.append("stopped")
                raise Stopped
            seen[0] += 1
            real(*args, **kwargs)

        return remove

    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(os, "unlink", counted(os.unlink))
        patch.setattr(os, "rmdir", counted(os.rmdir))
        yield stopped


def days_later(monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """The machine's clock goes forward, for whoever asks Python."""
    day = datetime.date.today() + datetime.timedelta(days)

    class Date(datetime.date):
        @classmethod
        def today(cls) -> "Date":
            return cls(day.year, day.month, day.day)

    class Now(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Now":
            return cls(day.year, day.month, day.day, tzinfo=tz)

    monkeypatch.setattr("datetime.date", Date)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Now)


# --- Ctrl-C, and a full disk


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def over_quota(self: Path, data: bytes) -> int:
    with self.open("wb") as file:
        file.write(data[:10])
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
