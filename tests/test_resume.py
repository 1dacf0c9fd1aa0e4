"""A run that stops at any commit and is resumed ends in the same bytes.

Runs stop by an exception at every commit, and while the finished work directory is removed. At no moment may OUT look
like a finished checkpoint when it is not: its config.json is written last."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from onecard.checkpoint.workdir import WorkDir
from runs import STAGES, Contents, Run, assert_whole_or_no_checkpoint, contents, differences, stopped_after_removals

# --- killed and resumed


@pytest.mark.parametrize("committed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", range(1, STAGES + 1))
def test_stopped_at_every_commit(run: Run, whole: Contents, stage: int, committed: bool) -> None:
    run.stopped_at(stage, committed=committed)
    state = json.loads((run.work / "state.json").read_text())
    assert state["done"] == stage - (not committed)
    assert_whole_or_no_checkpoint(run.out)
    assert differences(run.resumed(), whole) == []


def test_what_a_commit_rests_on_is_on_disk_before_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden rows lie in memory, but those of a committed step must survive a crash of the machine."""
    synced: set[Path] = set()
    real_fsync, real_commit = os.fsync, WorkDir.commit
    checked = []

    def fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def commit(workdir: WorkDir, done: int) -> None:
        if done in (2, 3, 4):  # embed, and both blocks
            entering = workdir.path.resolve() / "acts" / f"{done - 2:04d}"
            needed = [entering, *entering.glob("*.safetensors")]
            assert len(needed) > 2
            assert set(needed) <= synced, done
            checked.append(done)
        real_commit(workdir, done)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(WorkDir, "commit", commit)
    assert run().exit_code == 0
    assert checked == [2, 3, 4]


def test_there_are_no_more_stages(run: Run) -> None:
    """So the test above stops at every commit."""
    seen = []
    real = WorkDir.commit

    def commit(workdir: WorkDir, done: int) -> None:
        seen.append(done)
        real(workdir, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDir, "commit", commit)
        assert run().exit_code == 0
    assert seen == list(range(1, STAGES + 1))


def test_round_to_nearest_resumes_too(run: Run, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Round-to-nearest has no activations to resume from."""
    run.recipe = recipe(method="rtn")
    reference = Run(run.model, tmp_path / "reference", run.recipe, run.texts)
    assert reference().exit_code == 0
    run.stopped_at(3)
    assert differences(run.resumed(), contents(reference.out)) == []


def test_killed_while_the_work_directory_is_removed(run: Run, whole: Contents) -> None:
    """OUT is whole by then. Whatever is left of the work directory, --resume succeeds and removes it."""
    run.stopped_at(STAGES)
    saved = run.out.with_name("saved")
    shutil.copytree(run.work, saved)
    result = run("--resume")
    assert result.exit_code == 0
    for number in range(40):
        shutil.copytree(saved, run.work, dirs_exist_ok=True)
        with stopped_after_removals(number) as stopped:
            assert run("--resume").exit_code == 0
        left = sorted(str(p.relative_to(run.work)) for p in run.work.rglob("*")) if run.work.exists() else []
        again = run("--resume")
        assert again.exit_code == 0, (number, left, again.stderr)
        assert not run.work.exists()
        assert differences(contents(run.out), whole) == []
        if not stopped:
            return
    pytest.fail("the work directory has more files than this test expects")


# --- not the same run


def test_a_finished_run_is_resumed_without_a_change(run: Run, whole: Contents) -> None:
    first = run()
    assert first.exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in run.out.rglob("*")}
    again = run("--resume")
    assert again.exit_code == 0
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in run.out.rglob("*")} == before
    assert not run.work.exists()


def test_nothing_began(run: Run, whole: Contents) -> None:
    """--resume of a run that was killed before its first byte is that run."""
    assert differences(run.resumed(), whole) == []
