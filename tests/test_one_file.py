"""A model that fits into one shard becomes one file without an index, with the same tensors, wherever a run stops."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from command_line import Refuse, run_onecard
from onecard.checkpoint import emit, files
from onecard.checkpoint.emit import join_shards
from onecard.checkpoint.loading import load_with_transformers
from onecard.checkpoint.model import open_model
from onecard.conversion import conversion
from onecard.core.layout import METADATA, StoredTensor
from onecard.core.tensors import DTYPE_NAMES, TORCH_DTYPES
from runs import STAGES, Contents, Run, assert_whole_or_no_checkpoint, contents, differences, in_child, kill

NAME, INDEX = "model.safetensors", "model.safetensors.index.json"
WHOLE = 10**9


def tensors_of(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every stored tensor, as the safetensors library reads it."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert name not in found
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = (tensor.dtype, tuple(tensor.shape), data)
    return found


def weight_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors*")}


@pytest.fixture
def one(run: Run, recipe: Callable[..., Path]) -> Run:
    """The run of `run`, with room for the model in one shard."""
    return Run(run.model, run.out, recipe(max_shard_bytes=WHOLE), run.texts)


TENSORS = st.dictionaries(
    st.text("abc.é\u2028", min_size=1, max_size=6),
    st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TENSORS, st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**31))
def test_a_joined_file_is_what_the_library_writes(
    tmp_path: Path, kinds: dict[str, tuple[str, list[int]]], count: int, at_once: int, seed: int
) -> None:
    """Byte by byte, however the tensors were spread over files and however little is copied at a time."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, (dtype, shape) in kinds.items():
        size = torch.Size(shape).numel() * TORCH_DTYPES[dtype].itemsize
        data = torch.randint(0, 2, (size,), dtype=torch.uint8, generator=generator)
        values[name] = data.view(TORCH_DTYPES[dtype]).reshape(shape)
    pieces = []
    for number in range(count):
        pieces.append(tmp_path / f"{number}.safetensors")
        save_file({name: values[name] for name in list(values)[number::count]}, pieces[-1], metadata=METADATA)
    save_file(values, tmp_path / "expected.safetensors", metadata=METADATA)
    stored = [StoredTensor(name, DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in values.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emit, "COPY_BYTES", at_once)
        join_shards(pieces, stored, tmp_path / "joined.safetensors")
    assert (tmp_path / "joined.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_one_file_holds_the_same_tensors_as_shards(
    family: str, emitted: Callable[..., tuple[Path, Result]], baby: Callable[..., Path], one: Run, recipe: Any
) -> None:
    sharded, _ = emitted(family)
    run = Run(baby(family), one.out, one.recipe, one.texts)
    promised = json.loads(run_onecard("plan", run.model, "--recipe", run.recipe).stdout)
    assert run().exit_code == 0
    assert weight_files(run.out) == {NAME}
    assert len(weight_files(sharded)) > 3
    assert tensors_of(run.out) == tensors_of(sharded)
    assert (run.out / "config.json").read_bytes() == (sharded / "config.json").read_bytes()
    size = (run.out / NAME).stat().st_size
    plan = json.loads((run.out / "onecard.json").read_text())["plan"]
    assert size == promised["emitted_bytes"] == plan["emitted_bytes"]
    assert (plan["shards"], promised["shards"], plan["index_bytes"]) == (1, 1, 0)
    assert run_onecard("check", run.out).exit_code == 0
    model, other = open_model(str(run.out)), open_model(str(sharded))
    assert {n: model.source.info(n) for n in model.source.names} == {
        n: other.source.info(n) for n in other.source.names
    }


def test_transformers_loads_the_one_file_as_it_loads_shards(one: Run, emitted: Callable[..., Any]) -> None:
    assert one().exit_code == 0
    left, right = (load_with_transformers(out, torch.float32).state_dict() for out in (one.out, emitted("qwen3")[0]))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("form", ["gptq", "bf16", "compressed-tensors"])
def test_an_export_that_fits_is_one_file_of_the_same_tensors(
    form: str, one: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert one().exit_code == 0
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    line = json.loads(run_onecard("export", one.out, "--format", form, "-o", whole).stdout)
    assert weight_files(whole) == {NAME}
    assert line["files"][NAME] == line["weight_bytes"] == (whole / NAME).stat().st_size
    assert run_onecard("check", whole).exit_code == 0
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 60_000)
    assert run_onecard("export", one.out, "--format", form, "-o", shards).exit_code == 0
    assert len(weight_files(shards)) > 3
    assert tensors_of(whole) == tensors_of(shards)


def test_a_model_that_is_one_byte_too_large_stays_in_shards(one: Run, recipe: Callable[..., Path]) -> None:
    assert one().exit_code == 0
    size = (one.out / NAME).stat().st_size
    fits = Run(one.model, one.out.with_name("fits"), recipe(max_shard_bytes=size), one.texts)
    over = Run(one.model, one.out.with_name("over"), recipe(max_shard_bytes=size - 1), one.texts)
    assert fits().exit_code == over().exit_code == 0
    assert weight_files(fits.out) == {NAME}
    assert INDEX in weight_files(over.out)
    assert tensors_of(over.out) == tensors_of(fits.out) == tensors_of(one.out)


# --- stopped while the file is joined


def kill_at_join(moment: str) -> None:
    """From now on, SIGKILL this process when the file is half joined, whole but not renamed, or renamed."""
    real, write = os.replace, files.write_pieces

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == NAME and moment == "whole":
            kill()
        real(source, target)
        if Path(target).name == NAME and moment == "renamed":
            kill()

    def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
        def some() -> Iterable[bytes]:
            for number, piece in enumerate(pieces):
                if number == 20:
                    kill()
                yield piece

        write(path, some() if moment == "half" else pieces)

    os.replace, files.write_pieces = replace, write_pieces


@pytest.fixture
def joined(one: Run, tmp_path: Path) -> Contents:
    """What an undisturbed run ends in."""
    reference = Run(one.model, tmp_path / "reference", one.recipe, one.texts)
    assert reference().exit_code == 0
    return contents(reference.out)


@pytest.mark.parametrize("moment", ["half", "whole", "renamed"])
def test_killed_in_the_join(one: Run, joined: Contents, moment: str) -> None:
    """SIGKILL: the folder cannot be loaded, and the resumed run ends in the same bytes."""

    def broken() -> Result:
        kill_at_join(moment)
        return one()

    assert in_child(broken) == signal.SIGKILL
    assert (one.out / NAME).exists() == (moment == "renamed")
    assert_whole_or_no_checkpoint(one.out, joined)
    assert not (one.out / "config.json").exists()
    assert in_child(lambda: one("--resume")) == 0
    assert differences(contents(one.out), joined) == []
    assert not one.work.exists()


def test_overwrite_removes_what_a_killed_join_left(one: Run, whole: Contents, run: Run) -> None:
    def broken() -> Result:
        kill_at_join("whole")
        return one()

    assert in_child(broken) == signal.SIGKILL
    assert list(one.out.glob("*.partial"))
    assert run("--overwrite").exit_code == 0
    assert differences(contents(run.out), whole) == []


@pytest.mark.parametrize("stage", range(1, STAGES + 1))
def test_stopped_at_any_stage_and_resumed(one: Run, joined: Contents, stage: int) -> None:
    one.stopped_at(stage)
    assert_whole_or_no_checkpoint(one.out, joined)
    assert differences(one.resumed(), joined) == []


def test_a_damaged_piece_is_found_before_it_is_joined(one: Run, refused: Refuse, joined: Contents) -> None:
    one.stopped_at(STAGES - 2, committed=True)
    victim = sorted((one.work / "shards").glob("*.safetensors"))[0]
    os.truncate(victim, victim.stat().st_size // 2)
    refused(one("--resume"), victim.name, "--overwrite")
    assert not one.out.exists()
    assert one("--overwrite").exit_code == 0
    assert differences(contents(one.out), joined) == []


def test_pieces_and_file_are_both_counted_when_the_disk_is_looked_at(
    one: Run, joined: Contents, refused: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work directory of a run that was stopped after the join, and OUT, together."""
    one.stopped_at(STAGES - 1)
    needed = sum(path.stat().st_size for path in (*one.out.glob("*.safetensors"), *(one.work / "shards").iterdir()))
    shutil.rmtree(one.out)
    shutil.rmtree(one.work)
    usage = shutil.disk_usage(one.model)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=needed - 1))
    refused(one(), "--work", code=4)
