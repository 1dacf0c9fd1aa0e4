"""A full disk ends a run with one message and exit code 4; no file is half written, and the run can be resumed."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from command_line import Refuse
from onecard.checkpoint import files
from runs import STAGES, Contents, Run, assert_whole_or_no_checkpoint, contents, differences, no_space, over_quota


def no_space_in_rust(tensors: object, path: Path, metadata: object = None) -> None:
    path.write_bytes(b"a part of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def no_room_for_a_folder(self: Path, *args: object, **kwargs: object) -> None:
    if not self.is_dir():
        no_space()


FULL = {
    "a shard": ("onecard.checkpoint.files.write_values", no_space),
    "rows, said by the library": ("onecard.checkpoint.files.save_file", no_space_in_rust),
    "state and index": ("pathlib.Path.write_bytes", over_quota),
    "fsync": ("os.fsync", no_space),
    "a folder": ("pathlib.Path.mkdir", no_room_for_a_folder),
    "a rename": ("os.replace", no_space),
}


@pytest.mark.parametrize(
    ("what", "stage"),
    [*((what, 2) for what in FULL), *((what, STAGES - 2) for what in ("a folder", "a rename", "state and index"))],
)
def test_full_disk(run: Run, refused: Refuse, whole: Contents, tmp_path: Path, what: str, stage: int) -> None:
    """The disk is full in a block, or when files move to OUT: one clean message, exit code 4 and no half-written file.
    With room again the run ends in the same bytes."""
    run.stopped_at(stage, committed=stage > 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*FULL[what])
        refused(run("--resume"), "full", "--resume", code=4)
    assert not list(tmp_path.rglob("*.partial"))
    assert_whole_or_no_checkpoint(run.out)
    assert differences(run.resumed(), whole) == []


def test_a_disk_that_is_too_small_is_refused_at_once(
    run: Run, refused: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    refused(run(), "MB", "--work", code=4)
    assert not run.work.exists()
    assert not run.out.exists()


def test_work_on_another_disk(run: Run, whole: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT and WORK are on two file systems, where renames fail: the files are copied whole."""
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert run().exit_code == 0
    assert differences(contents(run.out), whole) == []


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a write fails, the old file stays."""
    files.write_json(tmp_path / "x.json", {"old": 1})
    for target, broken in (("os.replace", no_space), ("os.fsync", no_space), ("pathlib.Path.write_bytes", over_quota)):
        with monkeypatch.context() as patch:
            patch.setattr(target, broken)
            with pytest.raises(Exception, match="full"):
                files.write_json(tmp_path / "x.json", {"new": 2})
        assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
