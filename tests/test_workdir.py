"""A run that is killed anywhere and resumed ends in the same bytes; one that is not the same run is refused.

Stages are broken off in three ways: an exception at every commit, a real SIGKILL in a forked child at renames and
inside a write, and Ctrl-C while the finished work directory is being removed. At no moment may OUT look like a
checkpoint that is not whole: its config.json comes last.
"""

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from babies import edit_json
from onecard.checkpoint import files
from onecard.checkpoint.workdir import WorkDir
from onecard.core.errors import InputError

Check = Callable[..., str]
Contents = dict[str, Any]
FAMILY = "qwen3"  # the quickest baby


def contents(folder: Path) -> Contents:
    """Every file of a folder with its bytes; of the record all but `machine`, which may differ, and so may its line in
    SHA256SUMS."""
    found: Contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "onecard.json" in found:
        found["onecard.json"] = {k: v for k, v in json.loads(found["onecard.json"]).items() if k != "machine"}
    if "SHA256SUMS" in found:
        found["SHA256SUMS"] = [line for line in found["SHA256SUMS"].splitlines() if not line.endswith(b"onecard.json")]
    return found


def differences(left: Contents, right: Contents) -> list[str]:
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


class Stopped(BaseException):
    """Ends a run where a kill would; nothing may catch it."""


class Run:
    """One quantize command on a baby, to be broken off and resumed."""

    def __init__(self, model: Path, out: Path, recipe: Path, texts: list[str], onecard: Callable[..., Result]) -> None:
        self.model, self.out, self.recipe, self.texts, self._onecard = model, out, recipe, texts, onecard
        self.work = out.with_name(out.name + ".work")

    def __call__(self, *flags: object, recipe: Path | None = None, out: Path | None = None) -> Result:
        return self._onecard(
            "quantize", self.model, out or self.out, "--recipe", recipe or self.recipe, *self.texts, *flags
        )

    def stopped_at(self, stages: int, *flags: object, committed: bool = False) -> None:
        """Run, and stop when `stages` stages are done: all their files are there, and the commit is made or is not."""
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


@pytest.fixture
def run(
    baby: Callable[..., Path],
    tmp_path: Path,
    recipe: Callable[..., Path],
    texts: list[str],
    onecard: Callable[..., Result],
) -> Run:
    return Run(baby(FAMILY), tmp_path / "out", recipe(), texts, onecard)


@pytest.fixture(scope="module")
def whole(emitted: Callable[..., tuple[Path, Result]]) -> Contents:
    """What an undisturbed run of the same recipe emits."""
    return contents(emitted(FAMILY)[0])


def assert_whole_or_no_checkpoint(out: Path, *wholes: Contents) -> None:
    """Invariant 9: a folder that is not finished cannot be loaded."""
    if (out / "config.json").exists():
        found = contents(out)
        assert any(not differences(found, one) for one in wholes), [differences(found, one) for one in wholes]


# --- killed and resumed

STAGES = 6  # embed, two blocks, the rest, move, verify


@pytest.mark.parametrize("committed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", range(1, STAGES + 1))
def test_stopped_at_every_commit(run: Run, whole: Contents, stage: int, committed: bool) -> None:
    run.stopped_at(stage, committed=committed)
    state = json.loads((run.work / "state.json").read_text())
    assert state["done"] == stage - (not committed)
    assert_whole_or_no_checkpoint(run.out)
    assert differences(run.resumed(), whole) == []


def test_what_a_commit_rests_on_is_on_disk_before_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden rows are written without waiting for the disk; those of a committed stage must not be lost with the
    machine."""
    synced: set[Path] = set()
    real_fsync, real_commit = os.fsync, WorkDir.commit
    checked = []

    def fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def commit(workdir: WorkDir, done: int) -> None:
        if done <= 2:  # embed, and the first of two blocks
            entering = workdir.path.resolve() / "acts" / f"{done - 1:04d}"
            needed = [entering, *entering.iterdir()]
            assert len(needed) > 2
            assert set(needed) <= synced, done
            checked.append(done)
        real_commit(workdir, done)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(WorkDir, "commit", commit)
    assert run().exit_code == 0
    assert checked == [1, 2]


def test_there_are_no_more_stages(run: Run) -> None:
    """So that the test above breaks off at every commit there is."""
    seen = []
    real = WorkDir.commit

    def commit(workdir: WorkDir, done: int) -> None:
        seen.append(done)
        real(workdir, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDir, "commit", commit)
        assert run().exit_code == 0
    assert seen == list(range(1, STAGES + 1))


def test_round_to_nearest_resumes_too(
    run: Run, recipe: Callable[..., Path], tmp_path: Path, onecard: Callable[..., Result]
) -> None:
    """It has no activations to go on from."""
    run.recipe = recipe(method="rtn")
    reference = Run(run.model, tmp_path / "reference", run.recipe, run.texts, onecard)
    assert reference().exit_code == 0
    run.stopped_at(3)
    assert differences(run.resumed(), contents(reference.out)) == []


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
    real, seen = files.save_file, [0]

    def save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
        real(tensors, path, metadata=metadata)
        seen[0] += 1
        if seen[0] == number:
            os.truncate(path, path.stat().st_size // 2)
            kill()

    files.save_file = save_file


def test_killed_with_sigkill_anywhere(run: Run, tmp_path: Path, onecard: Callable[..., Result]) -> None:
    """The short form of benchmarks/kill_resume.py: kill -9 of a real process that holds the lock, again and again."""
    reference = Run(run.model, tmp_path / "reference", run.recipe, run.texts, onecard)
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


def test_killed_again_and_again_in_one_run(run: Run, tmp_path: Path, onecard: Callable[..., Result]) -> None:
    """Every resume gets a little further, is killed in turn, and the last one ends in the same bytes."""
    reference = Run(run.model, tmp_path / "reference", run.recipe, run.texts, onecard)
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


@contextmanager
def stopped_after_removals(number: int) -> Iterator[list[str]]:
    """Stop at the removal with this number, of a file or a folder: what a kill during rmtree leaves. The list that is
    given holds a word when it came to that."""
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


def test_killed_while_the_work_directory_is_removed(run: Run, whole: Contents) -> None:
    """OUT is whole by then. Whatever is left of the work directory, --resume ends well and removes it."""
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


# --- a run over an older one


def test_overwrite_that_is_killed_and_resumed(
    run: Run, whole: Contents, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """OUT holds the old checkpoint, or none that loads, or the new one; and at the end not one file of the old."""
    older = Run(run.model, run.out, recipe(method="rtn", max_shard_bytes=20_000), run.texts, run._onecard)
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
    """Old and new shards in one folder make no checkpoint: not before the kill, not when a resumed run moves on."""
    older = Run(run.model, run.out, recipe(method="rtn"), run.texts, run._onecard)
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
    """--overwrite over an unfinished run of another recipe: nothing of it shows."""
    Run(run.model, run.out, recipe(method="rtn"), run.texts, run._onecard).stopped_at(4)
    assert run("--overwrite").exit_code == 0
    assert differences(contents(run.out), whole) == []
    assert not run.work.exists()


# --- not the same run


def changed_recipe(run: Run, recipe: Callable[..., Path]) -> None:
    run.recipe = recipe(damping=0.02)


def changed_config(run: Run, recipe: Callable[..., Path]) -> None:
    config = json.loads((run.model / "config.json").read_text())
    (run.model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def changed_size(run: Run, recipe: Callable[..., Path]) -> None:
    (file,) = run.model.glob("*.safetensors")
    save_file(load_file(file), file, metadata={"format": "pt", "note": "another header, the same weights"})


def changed_weights(run: Run, recipe: Callable[..., Path]) -> None:
    """Another model of the same shapes: a fine-tune."""
    (file,) = run.model.glob("*.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def changed_tokenizer(run: Run, recipe: Callable[..., Path]) -> None:
    tokenizer = json.loads((run.model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (run.model / "tokenizer.json").write_text(json.dumps(tokenizer))


def changed_template(run: Run, recipe: Callable[..., Path]) -> None:
    template = run.model / "chat_template.jinja"
    template.write_text(template.read_text() + "!")


def changed_calibration(run: Run, recipe: Callable[..., Path]) -> None:
    change_text(run, 1)


def changed_evaluation(run: Run, recipe: Callable[..., Path]) -> None:
    change_text(run, 3)


def change_text(run: Run, option: int) -> None:
    """One letter more in one document."""
    lines = Path(run.texts[option]).read_text().splitlines()
    assert json.loads(lines[1])["text"]
    lines[1] = json.dumps({"text": json.loads(lines[1])["text"] + "x"})
    path = run.out.with_name("changed.jsonl")
    path.write_text("\n".join(lines))
    run.texts = [*run.texts[:option], str(path), *run.texts[option + 1 :]]


CHANGES: dict[str, tuple[Callable[[Run, Callable[..., Path]], None], str]] = {
    "recipe": (changed_recipe, "recipe's damping"),
    "a value of config.json": (changed_config, "source"),
    "a shard's header": (changed_size, "source"),
    "weights alone": (changed_weights, "source"),
    "tokenizer": (changed_tokenizer, ""),
    "chat template": (changed_template, ""),
    "calibration texts": (changed_calibration, "calibration texts"),
    "evaluation texts": (changed_evaluation, "evaluation texts"),
}


@pytest.fixture
def own(run: Run, copied: Callable[..., Path]) -> Run:
    """A run on a model that may be changed."""
    run.model = copied(FAMILY)
    return run


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("stage", [2, "finished"])
def test_changed_since(own: Run, refused: Check, recipe: Callable[..., Path], stage: Any, kind: str) -> None:
    """Another run is not resumed and not taken for done: what changed is named, and nothing is touched."""
    if stage == "finished":
        assert own().exit_code == 0
    else:
        own.stopped_at(stage)
    change, named = CHANGES[kind]
    change(own, recipe)
    before = contents(own.work), contents(own.out) if own.out.exists() else {}
    refused(own("--resume"), named, "--overwrite")
    assert (contents(own.work), contents(own.out) if own.out.exists() else {}) == before


def test_changed_version(run: Run, refused: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    run.stopped_at(2)
    monkeypatch.setattr("onecard.pipeline.__version__", "99.0")
    refused(run("--resume"), "onecard was", "99.0", "--overwrite")


def test_every_change_is_named(own: Run, refused: Check, recipe: Callable[..., Path]) -> None:
    own.stopped_at(2)
    for kind in ("recipe", "a value of config.json", "evaluation texts"):
        CHANGES[kind][0](own, recipe)
    refused(own("--resume"), "recipe's damping was 0.01 and is 0.02", "source was", "evaluation texts was")


@pytest.mark.parametrize("stage", [STAGES - 1, STAGES])
def test_changed_out(run: Run, refused: Check, whole: Contents, stage: int) -> None:
    """Shards that were moved to one folder are not continued in another; the first is finished as it was."""
    run.stopped_at(stage)
    other = run.out.with_name("other")
    refused(run("--resume", "--work", run.work, out=other), other)
    assert not other.exists()
    assert differences(run.resumed(), whole) == []


def test_an_unfinished_run_is_not_begun_again_by_mistake(run: Run, refused: Check, whole: Contents) -> None:
    run.stopped_at(3)
    refused(run(), run.work, "--resume", "--overwrite")
    assert differences(run.resumed(), whole) == []


def test_a_finished_run_is_resumed_without_a_change(run: Run, whole: Contents) -> None:
    first = run()
    assert first.exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in run.out.rglob("*")}
    again = run("--resume")
    assert again.exit_code == 0
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in run.out.rglob("*")} == before
    assert not run.work.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"command": "quantize"}', '{"strange": 1}'])
def test_a_damaged_record_in_a_finished_run(run: Run, refused: Check, content: str) -> None:
    assert run().exit_code == 0
    (run.out / "onecard.json").write_text(content)
    refused(run("--resume"), "onecard.json", "--overwrite")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"done": "2"}', '{"done": 2, "identity": 5}'])
def test_a_damaged_state(run: Run, refused: Check, whole: Contents, content: str) -> None:
    run.stopped_at(2)
    (run.work / "state.json").write_text(content)
    refused(run("--resume"), "state.json", "--overwrite")
    assert run("--overwrite").exit_code == 0
    assert differences(contents(run.out), whole) == []


def test_nothing_began(run: Run, whole: Contents) -> None:
    """--resume of a run that was killed before its first byte is that run."""
    assert differences(run.resumed(), whole) == []


# --- whose folder is it


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]], ids=lambda f: "".join(f) or "fresh")
def test_work_is_a_folder_of_somebody_else(run: Run, refused: Check, flags: list[str]) -> None:
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
def test_held_by_a_live_run(run: Run, refused: Check, flags: list[str], elsewhere: bool) -> None:
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


def test_resume_never_clears_a_folder_that_overwrite_was_not_said_for(
    run: Run, refused: Check, whole: Contents
) -> None:
    """Files that lie in OUT, or in another OUT, when an unfinished run goes on are somebody's."""
    run.stopped_at(2)
    for out in (run.out, run.out.with_name("documents")):
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        refused(run("--resume", "--work", run.work, out=out), out, "--overwrite")
        assert contents(out) == {"thesis.txt": b"mine"}
    (run.out / "thesis.txt").unlink()
    assert differences(run.resumed(), whole) == []


def test_overwrite_that_is_killed_while_it_clears_the_old_work(run: Run, whole: Contents) -> None:
    """Half of an older run's work is no run: --resume begins anew, and so does --overwrite."""
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


def test_the_work_directory_may_be_a_link(run: Run, whole: Contents) -> None:
    scratch = run.out.with_name("scratch")
    scratch.mkdir()
    run.work.symlink_to(scratch)
    assert run().exit_code == 0
    assert differences(contents(run.out), whole) == []
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "stage"),
    [("shards/*.safetensors", 3), ("acts/*/*.safetensors", 3), ("blocks/*.json", 3), ("sensitivity/*.safetensors", 2)],
)
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_what_is_finished_was_damaged(
    run: Run, refused: Check, whole: Contents, what: str, stage: int, how: str
) -> None:
    """Said at once, with the way out, and never moved to OUT."""
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


def test_emitted_files_are_readable_by_others(whole: Contents, run: Run) -> None:
    old = os.umask(0o022)
    try:
        assert run().exit_code == 0
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in run.out.iterdir()} == {0o644}


# --- Ctrl-C, and a full disk


@pytest.mark.parametrize("work", [None, "elsewhere"])
def test_ctrl_c_says_how_to_go_on(run: Run, refused: Check, whole: Contents, work: str | None) -> None:
    flags = [] if work is None else ["--work", str(run.out.with_name(work))]
    run.work = run.work if work is None else run.out.with_name(work)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onecard.blocks.quantize._quantize_site", interrupted)
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
            patch.setattr("onecard.blocks.quantize._quantize_site", terminated)
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
    monkeypatch.setattr("onecard.eval.verify.twin_walk", interrupted)
    result = onecard("verify", baby(FAMILY), out, *texts[2:])
    assert result.exit_code == 130
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_memory_that_runs_out(run: Run, refused: Check, whole: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("onecard.blocks.quantize._quantize_site", out_of_memory)
        refused(run(), "memory", "output_blocks", "--resume", code=4)
    assert differences(run.resumed(), whole) == []


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_rust(tensors: object, path: Path, metadata: object = None) -> None:
    path.write_bytes(b"a part of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def over_quota(self: Path, data: bytes) -> int:
    with self.open("wb") as file:
        file.write(data[:10])
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def no_room_for_a_folder(self: Path, *args: object, **kwargs: object) -> None:
    if not self.is_dir():
        no_space()


FULL = {
    "a shard": ("onecard.checkpoint.files.save_file", no_space),
    "a shard, said by the library": ("onecard.checkpoint.files.save_file", no_space_in_rust),
    "state and index": ("pathlib.Path.write_bytes", over_quota),
    "fsync": ("os.fsync", no_space),
    "a folder": ("pathlib.Path.mkdir", no_room_for_a_folder),
    "a rename": ("os.replace", no_space),
}


@pytest.mark.parametrize(
    ("what", "stage"),
    [*((what, 2) for what in FULL), *((what, STAGES - 2) for what in ("a folder", "a rename", "state and index"))],
)
def test_full_disk(run: Run, refused: Check, whole: Contents, tmp_path: Path, what: str, stage: int) -> None:
    """In a block, or when files move to OUT: one clean message and exit code 4, nothing half-written, and the same
    bytes when there is room again."""
    run.stopped_at(stage, committed=stage > 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*FULL[what])
        refused(run("--resume"), "full", "--resume", code=4)
    assert not list(tmp_path.rglob("*.partial"))
    assert_whole_or_no_checkpoint(run.out)
    assert differences(run.resumed(), whole) == []


def test_a_disk_that_is_too_small_is_refused_at_once(
    run: Run, refused: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    refused(run(), "MB", "--work", code=4)
    assert not run.work.exists()
    assert not run.out.exists()


def test_work_on_another_disk(run: Run, whole: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT and WORK on two file systems: a rename between them fails, and the files are copied whole."""
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert run().exit_code == 0
    assert differences(contents(run.out), whole) == []


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before stays there when a write fails."""
    files.write_json(tmp_path / "x.json", {"old": 1})
    for target, broken in (("os.replace", no_space), ("os.fsync", no_space), ("pathlib.Path.write_bytes", over_quota)):
        with monkeypatch.context() as patch:
            patch.setattr(target, broken)
            with pytest.raises(Exception, match="full"):
                files.write_json(tmp_path / "x.json", {"new": 2})
        assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
