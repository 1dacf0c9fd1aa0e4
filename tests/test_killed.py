"""A process that is killed, interrupted or out of memory: the resumed run ends in the same bytes.

SIGKILL hits a forked child at renames and inside a write."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from command_line import Refuse
from onecard.checkpoint import files
from onecard.core.layout import TEMPORARY
from runs import FAMILY, Contents, Run, assert_whole_or_no_checkpoint, contents, differences, in_child, kill

# --- killed and resumed


def kill_at_rename(number: int, after: bool) -> None:
    """From now on, SIGKILL this process at the given rename, before it or after it."""
    real, seen = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        seen[0] += 1
        if seen[0] == number and not after:
            kill()
        real(source, target)
        if seen[0] == number:
            kill()

    os.replace = replace


def kill_in_write(number: int) -> None:
    """From now on, SIGKILL this process when the given safetensors file is half written."""
    save, close, seen = files.save_file, files.TensorFile.close, [0]

    def written(path: Path) -> None:
        seen[0] += 1
        if seen[0] == number:
            os.truncate(path, path.stat().st_size // 2)
            kill()

    def save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
        save(tensors, path, metadata=metadata)
        written(path)

    def closed(file: files.TensorFile) -> None:
        written(file.path.with_name(file.path.name + TEMPORARY))
        close(file)

    files.save_file, files.TensorFile.close = save_file, closed  # type: ignore[method-assign]


def test_killed_with_sigkill_anywhere(run: Run, tmp_path: Path) -> None:
    """The short form of benchmarks/kill_resume.py: kill -9 of a real process that holds the lock, again and again."""
    reference = Run(run.model, tmp_path / "reference", run.recipe, run.texts)
    assert in_child(reference) == 0
    whole = contents(reference.out)
    kills: list[Callable[[], None]] = [lambda n=n: kill_at_rename(n, bool(n % 4 > 1)) for n in range(2, 200, 6)]  # type: ignore[misc]
    kills[1::4] = [lambda n=n: kill_in_write(n) for n in range(1, len(kills[1::4]) * 4, 4)]  # type: ignore[misc]
    killed = 0
    for prepare in kills:

        def broken(prepare: Callable[[], None] = prepare) -> Result:
            prepare()
            return run()

        ended = in_child(broken)
        if ended == 0:
            break  # the run has fewer renames than this: every earlier one was killed
        assert ended == signal.SIGKILL
        killed += 1
        assert_whole_or_no_checkpoint(run.out, whole)
        assert in_child(lambda: run("--resume")) == 0
        assert differences(contents(run.out), whole) == []
        assert not run.work.exists()
        shutil.rmtree(run.out)
    assert killed >= 5


def test_killed_again_and_again_in_one_run(run: Run, tmp_path: Path) -> None:
    """Every resume gets a little further, is killed in turn, and the last one ends in the same bytes."""
    reference = Run(run.model, tmp_path / "reference", run.recipe, run.texts)
    assert in_child(reference) == 0
    flags: list[str] = []
    for _ in range(12):

        def broken(flags: tuple[str, ...] = tuple(flags)) -> Result:
            kill_at_rename(11, after=True)
            return run(*flags)

        ended = in_child(broken)
        flags = ["--resume"]
        if ended == 0:
            break
        assert ended == signal.SIGKILL
    assert in_child(lambda: run("--resume")) == 0
    assert differences(contents(run.out), contents(reference.out)) == []


# --- Ctrl-C, and a full disk


@pytest.mark.parametrize("work", [None, "elsewhere"])
def test_ctrl_c_says_how_to_go_on(run: Run, refused: Refuse, whole: Contents, work: str | None) -> None:
    flags = [] if work is None else ["--work", str(run.out.with_name(work))]
    run.work = run.work if work is None else run.out.with_name(work)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onecard.blocks.quantize.quantize_batch", interrupted)
        result = run(*flags)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert str(run.work) in result.stderr
    assert "--resume" in result.stderr
    assert "Traceback" not in result.stderr
    assert not run.out.exists()
    assert run("--resume", *flags).exit_code == 0
    assert differences(contents(run.out), whole) == []
    assert not run.work.exists()


def test_sigterm_is_ctrl_c(run: Run, whole: Contents) -> None:
    """What a scheduler sends before it kills."""
    before = signal.getsignal(signal.SIGTERM)

    def terminated(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("onecard.blocks.quantize.quantize_batch", terminated)
            result = run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert differences(run.resumed(), whole) == []


def test_ctrl_c_in_verify(
    emitted: Callable[..., tuple[Path, Result]],
    onecard: Callable[..., Result],
    baby: Callable[..., Path],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    out, _ = emitted(FAMILY)  # before it is broken: quantize verifies too
    monkeypatch.setattr("onecard.eval.verify.measure", interrupted)
    result = onecard("verify", baby(FAMILY), out, *texts[2:])
    assert result.exit_code == 130
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_memory_that_runs_out(run: Run, refused: Refuse, whole: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("onecard.blocks.quantize.quantize_batch", out_of_memory)
        refused(run(), "memory", "output_blocks", "--resume", code=4)
    assert differences(run.resumed(), whole) == []
