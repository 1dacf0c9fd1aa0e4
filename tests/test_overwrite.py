"""--overwrite over an older run, finished or not: only the new run's files remain, whatever stops it on the way."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from babies import edit_json
from command_line import Refuse
from onecard.checkpoint import files
from onecard.checkpoint.workdir import WorkDir
from runs import (
    STAGES,
    Contents,
    Run,
    Stopped,
    assert_whole_or_no_checkpoint,
    contents,
    differences,
    stopped_after_removals,
)

# --- a run over an older one


def test_overwrite_that_is_killed_and_resumed(
    run: Run, whole: Contents, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """OUT holds the old checkpoint, none that loads, or the new one. At the end no file of the old one is left."""
    older = Run(run.model, run.out, recipe(method="rtn", max_shard_bytes=20_000), run.texts)
    assert older().exit_code == 0
    (run.out / "tokenizer.model").write_text("of the older run")
    edit_json(run.out / "onecard.json", lambda record: record["files"].append("tokenizer.model"))
    old = contents(run.out)
    assert len(old) > len(whole)
    shutil.copytree(run.out, tmp_path / "old")
    for stage in (2, STAGES - 1, STAGES):
        run.stopped_at(stage, "--overwrite")
        assert_whole_or_no_checkpoint(run.out, old, whole)
        assert differences(run.resumed(), whole) == [], stage
        shutil.rmtree(run.out)
        shutil.copytree(tmp_path / "old", run.out)
    assert run("--overwrite").exit_code == 0
    assert differences(contents(run.out), whole) == []


@pytest.mark.parametrize("number", [1, 3])
def test_overwrite_that_is_killed_while_it_moves(
    run: Run, whole: Contents, recipe: Callable[..., Path], number: int
) -> None:
    """Old and new shards in one folder never load as a checkpoint, neither before the kill nor while a resumed run
    moves files."""
    older = Run(run.model, run.out, recipe(method="rtn"), run.texts)
    assert older().exit_code == 0
    old = contents(run.out)
    assert len([name for name in whole if name.endswith(".safetensors")]) == 3
    run.stopped_at(STAGES - 2, "--overwrite")  # all shards are there, none is moved
    real, seen = files.move, [0]

    def move(path: Path, target: Path) -> None:
        seen[0] += 1
        if seen[0] == number:
            raise Stopped
        real(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "move", move)
        with pytest.raises(Stopped):
            run("--resume")
    assert_whole_or_no_checkpoint(run.out, old, whole)
    assert differences(run.resumed(), whole) == []


def test_overwrite_starts_anew(run: Run, whole: Contents, recipe: Callable[..., Path]) -> None:
    """--overwrite over an unfinished run of another recipe leaves no trace of it."""
    Run(run.model, run.out, recipe(method="rtn"), run.texts).stopped_at(4)
    assert run("--overwrite").exit_code == 0
    assert differences(contents(run.out), whole) == []
    assert not run.work.exists()


# --- not the same run


def test_an_unfinished_run_is_not_begun_again_by_mistake(run: Run, refused: Refuse, whole: Contents) -> None:
    run.stopped_at(3)
    refused(run(), run.work, "--resume", "--overwrite")
    assert differences(run.resumed(), whole) == []


# --- whose folder is it


def test_resume_never_clears_a_folder_that_overwrite_was_not_said_for(
    run: Run, refused: Refuse, whole: Contents
) -> None:
    """Files that appear in OUT while a run is unfinished belong to somebody, and so do those in another OUT."""
    run.stopped_at(2)
    for out in (run.out, run.out.with_name("documents")):
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        refused(run("--resume", "--work", run.work, out=out), out, "--overwrite")
        assert contents(out) == {"thesis.txt": b"mine"}
    (run.out / "thesis.txt").unlink()
    assert differences(run.resumed(), whole) == []


def test_overwrite_that_is_killed_while_it_clears_the_old_work(run: Run, whole: Contents) -> None:
    """Half of an older run's work cannot be resumed: --resume and --overwrite both start anew."""
    run.stopped_at(3)
    saved = run.out.with_name("saved")
    run.work.rename(saved)
    for number in itertools.count():
        shutil.copytree(saved, run.work)
        with stopped_after_removals(number) as stopped:
            WorkDir(run.work, {"recipe": "another"}, False, True)
        if not stopped:
            break
        assert differences(run.resumed(), whole) == []
        shutil.rmtree(run.out)
    assert number > 3
