"""Predicted bytes equal the bytes that safetensors writes (invariant 3), and shards keep order, limit and parts."""

import errno
import random
from itertools import chain, zip_longest
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from onecard.checkpoint import files
from onecard.checkpoint.files import TensorFile
from onecard.core.errors import ResourceError
from onecard.core.layout import METADATA, StoredTensor, file_bytes, file_header, shard_name, split_shards
from onecard.core.tensors import TORCH_DTYPES

DTYPES = st.sampled_from(["BF16", "F16", "F32", "I32", "I64", "U8", "I8", "F64", "I16", "BOOL", "F8_E4M3", "F8_E5M2"])
# Any text that UTF-8 can hold, control characters and quotes included, but not the format's own metadata key.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)
TENSORS = st.lists(st.builds(StoredTensor, NAMES, DTYPES, SHAPES), max_size=12, unique_by=lambda t: t.name)


def written_bytes(tensors: list[StoredTensor], folder: Path) -> int:
    values = {t.name: torch.zeros(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in tensors}
    assert all(v.nbytes == t.nbytes for v, t in zip(values.values(), tensors, strict=True))
    save_file(values, folder / "x.safetensors", metadata=METADATA)
    assert (folder / "x.safetensors").read_bytes().startswith(file_header(tensors))
    return (folder / "x.safetensors").stat().st_size


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TENSORS)
@example([StoredTensor('schicht.größe/"q"\\\n\t\x01\x7f\u2028😀', "BF16", (3, 5)), StoredTensor("é", "I64", ())])
@example([StoredTensor("empty", "F32", (0,)), StoredTensor("a", "U8", (3,)), StoredTensor("b", "F32", (2, 0, 4))])
def test_file_bytes_is_the_size_of_the_written_file(tmp_path: Path, tensors: list[StoredTensor]) -> None:
    assert file_bytes(tensors) == written_bytes(tensors, tmp_path)


def test_file_bytes_of_many_tensors_in_any_order(tmp_path: Path) -> None:
    """Offsets have up to seven digits and names don't sort like numbers; both change the header's length."""
    rng = random.Random(0)
    dtypes = ["BF16", "F16", "F32", "I32", "I64", "U8", "I8"]
    tensors = [StoredTensor(f"layers.{n}.w", rng.choice(dtypes), (rng.randint(0, 40), 9)) for n in range(3000)]
    size = written_bytes(tensors, tmp_path)
    assert file_bytes(tensors) == size
    rng.shuffle(tensors)
    assert file_bytes(tensors) == size == written_bytes(tensors, tmp_path)


@given(DTYPES, SHAPES)
def test_bytes_of_a_tensor(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    assert StoredTensor("x", dtype, shape).nbytes == tensor.numel() * tensor.element_size()


ATOMS = st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=4), max_size=8)


@settings(deadline=None)
@given(st.lists(ATOMS, max_size=5), st.integers(300, 3000))
def test_shards_keep_order_limit_and_parts(sizes: list[list[list[int]]], limit: int) -> None:
    """`sizes[part][atom]` are the lengths of the tensors that stay together."""
    parts = [
        [[StoredTensor(f"{s}.{a}.{t}", "U8", (n,)) for t, n in enumerate(atom)] for a, atom in enumerate(atoms)]
        for s, atoms in enumerate(sizes)
    ]
    shards = split_shards(parts, limit)
    for part, atoms in enumerate(parts):
        mine = [tensors for s, tensors in shards if s == part]
        assert list(chain(*mine)) == list(chain(*atoms)), "every tensor once, in order"
        starts = {id(atom[0]): atom for atom in atoms}
        for tensors, following in zip_longest(mine, mine[1:]):
            assert tensors, "no empty shard"
            assert id(tensors[0]) in starts, "a shard begins with a whole atom"
            assert file_bytes(tensors) <= limit or tensors == starts[id(tensors[0])], "over the limit only if one atom"
            if following is not None:
                assert file_bytes(tensors + starts[id(following[0])]) > limit, "the next atom would not have fitted"
    assert [part for part, _ in shards] == sorted(part for part, _ in shards)


@pytest.mark.parametrize(
    ("index", "total", "name"),
    [(0, 1, "model-00001-of-00001.safetensors"), (12, 50, "model-00013-of-00050.safetensors")],
)
def test_shards_are_numbered_from_one_as_hugging_face_does(index: int, total: int, name: str) -> None:
    assert shard_name(index, total) == name


def test_a_whole_plan_of_scouts_size_is_summed_without_weights() -> None:
    """48 blocks of 16 experts, three matrices each: headers and data, from shapes alone."""
    parts = []
    for block in range(48):
        shape = {"gate_proj": (8192, 5120), "up_proj": (8192, 5120), "down_proj": (5120, 8192)}
        parts.append(
            [
                [StoredTensor(f"layers.{block}.experts.{e}.{p}.weight_packed", "I32", (o, i // 8))]
                for e in range(16)
                for p, (o, i) in shape.items()
            ]
        )
    shards = split_shards(parts, 5_000_000_000)
    data = sum(prod(t.shape) * 4 for _, tensors in shards for t in tensors)
    assert data == 48 * 16 * 3 * 8192 * 5120 // 2
    headers = sum(file_bytes(tensors) for _, tensors in shards) - data
    assert 0 < headers < 400 * 48 * 16 * 3
    assert len(shards) == 48, "a block of 1.0 GB is one shard of its own"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TENSORS.filter(bool), st.randoms(use_true_random=False))
def test_a_file_that_grows_has_the_librarys_bytes(
    tmp_path: Path, tensors: list[StoredTensor], order: random.Random
) -> None:
    """Tensor by tensor, in any order; there is no file before the last."""
    values = {
        t.name: torch.tensor([order.randrange(256) for _ in range(t.nbytes)], dtype=torch.uint8)
        .view(TORCH_DTYPES[t.dtype])
        .reshape(t.shape)
        if t.dtype != "BOOL"
        else torch.ones(t.shape, dtype=torch.bool)
        for t in tensors
    }
    save_file(values, tmp_path / "whole", metadata=METADATA)
    (tmp_path / "grown").unlink(missing_ok=True)
    grown = TensorFile(tmp_path / "grown", tensors)
    for name in order.sample(list(values), len(values)):
        grown.write(name, values[name])
        assert not (tmp_path / "grown").exists()
    grown.close()
    assert (tmp_path / "grown").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown", "whole"]


def test_nothing_more_is_written_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    tensors = [StoredTensor(name, "U8", (3,)) for name in "ab"]
    grown, values = TensorFile(tmp_path / "grown", tensors), torch.ones(3, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_values", full)
        with pytest.raises(ResourceError, match="full"):
            grown.write("a", values)
    grown.write("b", values)
    grown.close()
    assert list(tmp_path.iterdir()) == []
