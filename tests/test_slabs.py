"""Every stored byte is read once by a load, a block of a run and an export. A run copies what it keeps: once more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from reads import Reads, watch_reads
from test_stored_layouts import saved_from_memory

import babies
from inputs import write_tokenizer
from onecard import stages
from onecard.checkpoint.model import Model, open_model
from onecard.checkpoint.source import Folder
from onecard.models.adapter import read
from walking import cpu_walk

LAYOUTS = [(family, "published") for family in ("scout", "maverick", *babies.UNFUSED)]
LAYOUTS += [(family, "the other") for family in ("scout", *babies.UNFUSED)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(family, layout) -> a baby whose experts are fused, or one by one; each family is published in one of the two."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, layout: str) -> Path:
        key = (family, layout)
        if key not in made:
            folder = tmp_path_factory.mktemp("stored") / "model"
            if layout == "published":
                made[key] = babies.make_baby(folder, family, 2)
            elif family in babies.UNFUSED:
                made[key] = saved_from_memory(folder, family)
            else:
                made[key] = taken_apart(babies.make_baby(folder.parent / "fused", family, 2), folder)
            write_tokenizer(made[key])
        return made[key]

    return get


def taken_apart(fused: Path, out: Path) -> Path:
    """A baby of Llama 4 with one tensor an expert's matrix."""
    model = open_model(str(fused))
    tensors = {name: read(model.adapter, model.folder, name) for name in model.adapter.expected()}
    return babies.save(out, model.adapter.config, tensors)


def block_bytes(model: Model, index: int) -> tuple[set[str], int]:
    """The stored tensors of a block, and their bytes."""
    prefix = model.adapter.block_prefix(index)
    names = {name for name in model.folder.names if name.startswith(prefix)}
    return names, sum(model.folder.infos[name].nbytes for name in names)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_a_load_reads_each_stored_byte_once(
    stored: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, family: str, layout: str
) -> None:
    model = open_model(str(stored(family, layout)))
    for index in range(model.adapter.n_blocks):
        names, nbytes = block_bytes(model, index)
        with monkeypatch.context() as patch:
            reads = watch_reads(patch)
            block = cpu_walk(model).load(index)
        assert reads.times(model.folder) == dict.fromkeys(names, 1)
        assert reads.nbytes == nbytes
        for _, name, _, _ in model.adapter.modules(index):
            assert torch.equal(block.weight(name), read(model.adapter, model.folder, f"{name}.weight")), name


@pytest.mark.parametrize("keys", [{}, {"quantize_roles": ["attention"]}], ids=["experts", "experts are kept"])
@pytest.mark.parametrize(("family", "layout"), [("scout", "published"), ("qwen3", "published"), ("qwen3", "the other")])
def test_a_block_of_a_run_reads_each_stored_byte_once(
    stored: Callable[[str, str], Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    family: str,
    layout: str,
    keys: dict[str, Any],
) -> None:
    model = open_model(str(stored(family, layout)))
    of_blocks: list[tuple[Reads, set[str]]] = []
    quantize_block = stages.quantize_block

    def watched(job: Any) -> Any:
        weights = (f"{module}.weight" for module in job.plan.schemes)
        quantized = {model.adapter.locate(name, model.folder.names).tensor for name in weights}
        with monkeypatch.context() as patch:
            of_blocks.append((watch_reads(patch), quantized))
            return quantize_block(job)

    monkeypatch.setattr(stages, "quantize_block", watched)
    result = onecard("quantize", model.path, tmp_path / "out", "--recipe", recipe(method="rtn", **keys), *texts)
    assert result.exit_code == 0, result.stderr
    for index, (reads, quantized) in enumerate(of_blocks):
        names = block_bytes(model, index)[0]
        assert names & quantized
        assert reads.times(model.folder) == {name: 1 if name in quantized else 2 for name in names}
    assert len(of_blocks) == model.adapter.n_blocks


def test_an_export_to_bf16_reads_each_expert_once(
    stored: Callable[[str, str], Path], onecard: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Gate and up of a stack go into a stack."""
    model = open_model(str(stored("scout", "published")))
    reads = watch_reads(monkeypatch)
    result = onecard("export", model.path, "--format", "bf16", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    written = sum(file.stat().st_size for file in babies.shard_files(tmp_path / "out"))
    assert model.folder.file_bytes <= reads.nbytes + 2**16 <= written + 2**17


def test_a_slice_of_one_expert_is_read_without_the_rest(
    stored: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stack `[experts, gates then ups, in]` the gate of one expert is one stretch of the file."""
    folder: Folder = open_model(str(stored("qwen3", "the other"))).folder
    name = next(name for name in folder.names if name.endswith("experts.gate_up_proj"))
    whole = folder.get(name)
    reads = watch_reads(monkeypatch)
    width = whole.shape[1] // 2
    for index in ((3, slice(0, width)), (3, slice(width, None), slice(1, 3)), (slice(1, 4), 2), (2, 1, 5), ()):
        got = folder.get(name, index)
        assert torch.equal(got, whole[index])
        assert got.is_contiguous()
    row = whole.stride(1) * whole.dtype.itemsize
    sizes = [width * row, width * row, 3 * 2 * width * row, whole.dtype.itemsize, whole.nbytes]
    assert [size for _, _, size in reads.stretches] == sizes
