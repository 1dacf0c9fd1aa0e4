"""The work directory: it is locked, it belongs to one run, and damage to it is found before anything moves to OUT."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Refuse
from onecard.checkpoint.workdir import WorkDir
from onecard.core.errors import InputError
from runs import Contents, Run, contents, differences


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]], ids=lambda f: "".join(f) or "fresh")
def test_work_is_a_folder_of_somebody_else(run: Run, refused: Refuse, flags: list[str]) -> None:
    run.work.mkdir()
    for name in ("thesis.txt", "lock"):
        (run.work / name).write_text("mine")
        before = contents(run.work)
        refused(run(*flags), run.work, "--work")
        assert contents(run.work) == before
    assert not run.out.exists()


HOLDER = """
import fcntl, sys
lock = open(sys.argv[1])
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("elsewhere", [False, True], ids=["this process", "another process"])
@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]], ids=lambda f: "".join(f) or "fresh")
def test_held_by_a_live_run(run: Run, refused: Refuse, flags: list[str], elsewhere: bool) -> None:
    run.stopped_at(2)
    before = contents(run.work)
    if elsewhere:
        command = [sys.executable, "-c", HOLDER, str(run.work / "lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            refused(run(*flags), run.work, "alive", "--work")
            holder.communicate("")
    else:
        with (run.work / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            refused(run(*flags), run.work, "alive", "--work")
    assert contents(run.work) == before
    assert not run.out.exists()


def test_lock_is_freed_when_the_directory_is_refused(tmp_path: Path) -> None:
    with WorkDir(tmp_path / "work", {"recipe": "a"}, False, False) as workdir:
        workdir.commit(3)
        with pytest.raises(InputError, match="alive"):
            WorkDir(tmp_path / "work", {"recipe": "a"}, True, False)
    with pytest.raises(InputError, match="recipe was a and is b"):
        WorkDir(tmp_path / "work", {"recipe": "b"}, True, False)
    with WorkDir(tmp_path / "work", {"recipe": "a"}, True, False) as workdir:
        assert workdir.done == 3
    with WorkDir(tmp_path / "work", {"recipe": "b"}, False, True) as workdir:
        assert workdir.done == 0
        workdir.remove()
    assert not (tmp_path / "work").exists()


def test_the_work_directory_may_be_a_link(run: Run, whole: Contents) -> None:
    scratch = run.out.with_name("scratch")
    scratch.mkdir()
    run.work.symlink_to(scratch)
    assert run().exit_code == 0
    assert differences(contents(run.out), whole) == []
    assert list(scratch.iterdir()) == []


def test_begun_by_another_version(run: Run, refused: Refuse, whole: Contents) -> None:
    """The numbers in a state count the stages of the version that wrote it."""
    run.stopped_at(3)
    path = run.work / "state.json"
    state = json.loads(path.read_text())
    del state["layout"]
    path.write_text(json.dumps(state))
    refused(run("--resume"), "version", "--overwrite")
    assert run("--overwrite").exit_code == 0
    assert differences(contents(run.out), whole) == []


@pytest.mark.parametrize(
    ("what", "stage"),
    [
        ("shards/*.safetensors", 3),
        ("acts/*/*.safetensors", 3),
        ("blocks/*.json", 3),
        ("verified/*.json", 3),
        ("digests/*.json", 3),
        ("sensitivity/*.safetensors", 2),
    ],
)
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_what_is_finished_was_damaged(
    run: Run, refused: Refuse, whole: Contents, what: str, stage: int, how: str
) -> None:
    """The damage is reported at once, with the way out, and nothing moves to OUT."""
    run.stopped_at(stage)
    victim = sorted(run.work.glob(what))[0]
    if how == "cut":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
    refused(run("--resume"), victim.name, "--overwrite")
    assert not run.out.exists()
    assert run("--overwrite").exit_code == 0
    assert differences(contents(run.out), whole) == []


@pytest.mark.parametrize("how", ["a bit", "two files swapped"])
def test_rows_that_are_not_what_was_written(run: Run, refused: Refuse, whole: Contents, how: str) -> None:
    """Sizes and headers are right, and the numbers are others."""
    run.stopped_at(3)
    first, second = sorted(run.work.glob("acts/*/quantized-*.safetensors"))[:2]
    if how == "a bit":
        data = bytearray(first.read_bytes())
        data[-1] ^= 1
        first.write_bytes(data)
    else:
        third = first.with_name("third")
        first.rename(third)
        second.rename(first)
        third.rename(second)
    refused(run("--resume"), first.name, "damaged", "--overwrite")
    assert run("--overwrite").exit_code == 0
    assert differences(contents(run.out), whole) == []


def test_emitted_files_are_readable_by_others(whole: Contents, run: Run) -> None:
    old = os.umask(0o022)
    try:
        assert run().exit_code == 0
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in run.out.iterdir()} == {0o644}
