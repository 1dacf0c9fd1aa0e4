"""A run verifies each block in its own pass: from the shard as the disk gives it back, against the untouched original,
and without reading the source once more."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reads import watch_reads

from command_line import Refuse, run_onecard
from onecard.blocks import quantize as quantizing
from onecard.checkpoint import checksums, emit
from onecard.checkpoint.checksums import SUMS_NAME, read_sums, sha256_file
from onecard.checkpoint.model import open_model
from onecard.checkpoint.source import open_folder
from onecard.models.block import Block
from runs import Contents, Run, contents, differences
from walking import cpu_walk


@pytest.mark.parametrize("shards", [{"max_shard_bytes": 10**9}, {}], ids=["one file", "shards"])
def test_the_independent_proof_says_the_same(
    run: Run, recipe: Callable[..., Path], shards: dict[str, int], tmp_path: Path
) -> None:
    run.recipe = recipe(tasks=["demo"], **shards)
    assert run().exit_code == 0
    assert (len(list(run.out.glob("*.safetensors"))) == 1) == bool(shards)
    file = tmp_path / "verify.json"
    result = run_onecard("verify", run.model, run.out, "--recipe", run.recipe, *run.texts[2:], "--record", file)
    assert result.exit_code == 0, result.stderr
    ours, theirs = json.loads((run.out / "onecard.json").read_text()), json.loads(file.read_text())
    for key in ("kl", "errors", "flips", "compute_dtype"):
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("method", ["rtn", "fast"])
def test_the_source_is_read_once(
    run: Run, recipe: Callable[..., Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the search for NaN, which a CPU makes before the work."""
    run.recipe = recipe(method=method)
    reads = watch_reads(monkeypatch)
    assert run().exit_code == 0
    folder = open_folder(run.model)
    experts = {name: times for name, times in reads.times(folder).items() if ".experts." in name}
    assert experts
    assert set(experts.values()) == {2.0}


def test_what_the_disk_gives_back_is_measured(
    run: Run, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that changes between the quantizer and the disk changes the KL, and the digest is that of the file."""
    run.recipe = recipe(method="rtn")
    assert run().exit_code == 0
    sound = json.loads((run.out / "onecard.json").read_text())["kl"]["kl_mean_nats"]
    real = emit.TensorFile.write

    def spoiling(file: emit.TensorFile, name: str, tensor: torch.Tensor) -> None:
        real(file, name, tensor * 3 if name.endswith("experts.3.down_proj.weight_scale") else tensor)

    monkeypatch.setattr(emit.TensorFile, "write", spoiling)
    assert run("--overwrite").exit_code == 0
    record = json.loads((run.out / "onecard.json").read_text())
    assert record["kl"]["kl_mean_nats"] > 1.05 * sound
    worst = record["errors"]["worst_experts"][0]
    assert worst["expert"] == 3
    sums = read_sums(run.out / SUMS_NAME)
    shards = list(run.out.glob("*.safetensors"))
    assert len(shards) > 1
    assert {path.name: sums[path.name] for path in shards} == {path.name: sha256_file(path) for path in shards}


def test_a_disk_that_gives_back_other_bytes(
    run: Run, recipe: Callable[..., Path], refused: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system held of a shard in RAM was sound; what comes from the disk is not."""
    real = checksums.files.let_go

    def decays(path: Path) -> None:
        real(path)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    run.recipe = recipe(method="rtn")
    monkeypatch.setattr(checksums.files, "let_go", decays)
    refused(run(), "give back", "--overwrite", code=4)
    assert not (run.out / "config.json").exists()


def test_nobody_writes_to_the_original(run: Run, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours that changed the original would change both sides of the verification. It ends the run."""
    real = quantizing.tune

    def tune(job: Any, *others: Any) -> list[float]:
        found = real(job, *others)
        job.original.weight(job.original.sites[0].first_module)[0, 0] += 1
        return found

    run.recipe = recipe(method="best", restarts=0, tabu_moves=2)
    monkeypatch.setattr(quantizing, "tune", tune)
    result = run()
    assert isinstance(result.exception, AssertionError)
    assert "original" in str(result.exception)


def test_marks_see_every_change(baby: Callable[..., Path]) -> None:
    block = cpu_walk(open_model(str(baby("scout")))).load(0)
    marks = block.marks()
    assert block.copy().marks() == marks
    for name, parameter in block.layer.named_parameters():
        kept = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1
        assert block.marks() != marks, name
        if len(parameter) > 1 and not torch.equal(kept[0], kept[-1]):
            parameter.data.copy_(kept.flip(0))
            assert block.marks() != marks, name
        parameter.data.copy_(kept)
    assert block.marks() == marks


@settings(deadline=None)
@given(
    width=st.integers(1, 17),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]),
    place=st.integers(0, 50),
    skipped=st.integers(0, 3),
)
def test_marks_see_a_change_at_every_width(width: int, dtype: torch.dtype, place: int, skipped: int) -> None:
    """Rows are read as wide integers where they fit; the last values of a row that they do not fit count, too."""
    held = torch.zeros(3 * width + skipped, dtype=dtype)
    layer = torch.nn.Module()
    layer.register_buffer("weight", held[skipped:].view(3, width))
    nobody: Any = None  # marks look at the weights alone
    block = Block(nobody, 0, layer, nobody)
    marks = block.marks()
    held[skipped + place % (3 * width)] = 1
    assert block.marks() != marks


def test_a_run_that_was_stopped_keeps_what_was_seen(run: Run, whole: Contents) -> None:
    """A resumed run does not verify a finished block again, and ends in the same record."""
    run.stopped_at(4)
    seen = sorted(path.name for path in (run.work / "verified").iterdir())
    assert seen == ["0000.json", "0001.json"]
    assert differences(run.resumed(), whole) == []
    assert contents(run.out)["onecard.json"]["kl"] == whole["onecard.json"]["kl"]
