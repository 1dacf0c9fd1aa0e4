"""Every verb refuses damaged weight files, indices, shapes, dtypes and values in the same words."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from babies import edit_json, shard_files
from command_line import Refuse
from onecard.checkpoint.source import open_folder
from onecard.core.errors import InputError


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- weights on disk


def test_missing_shards_are_all_named(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied(shards=3)
    gone = shard_files(model)[1:]
    for shard in gone:
        shard.unlink()
    refuse_model(model, *(f"{shard.name} is missing" for shard in gone), "Fetch")


def test_truncated_shards_are_all_named(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied(shards=3)
    first, second, third = shard_files(model)
    first.write_bytes(first.read_bytes()[:-10])
    second.write_bytes(second.read_bytes()[:5])
    third.write_bytes(b"")
    refuse_model(model, first.name, second.name, third.name, "Fetch")


def _overlap(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
    a, b = [k for k, v in header.items() if k != "__metadata__" and v["shape"] == [64]][:2]
    header[a]["data_offsets"] = header[b]["data_offsets"]
    return header, data


def _hole(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    header[last]["data_offsets"] = [o + 8 for o in header[last]["data_offsets"]]
    return header, data + bytes(8)


def _entry(**changes: Any) -> Callable[[dict[str, Any], bytes], tuple[Any, bytes]]:
    def spoil(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        header["model.norm.weight"].update(changes)
        return header, data

    return spoil


HEADERS: dict[str, Callable[[dict[str, Any], bytes], tuple[Any, bytes]]] = {
    "no JSON": lambda h, d: (b"{" + b"x" * 62 + b"}", d),
    "no UTF-8": lambda h, d: (b"\xff" * 64, d),
    "a list": lambda h, d: ([h], d),
    "deeply nested": lambda h, d: (b"[" * 100_000, d),
    "entry is null": lambda h, d: (h | {"model.norm.weight": None}, d),
    "two tensors on the same bytes": _overlap,
    "a hole in the data": _hole,
    "data past the end": lambda h, d: (h, d + b"more"),
    "unknown dtype": _entry(dtype="F3"),
    "dtype is a list": _entry(dtype=[]),
    "shape of fractions": _entry(shape=[64.0]),
    "shape of words": _entry(shape=["64"]),
    "shape too small": _entry(shape=[2]),
    "three offsets": _entry(data_offsets=[0, 64, 128]),
    "offsets of words": _entry(data_offsets=["0", "128"]),
    "no offsets": _entry(data_offsets=None),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_damaged_header(copied: Callable[..., Path], refuse_model: Refuse, kind: str) -> None:
    model = copied()
    (file,) = shard_files(model)
    file.write_bytes(with_header(*HEADERS[kind](*header_of(file))))
    refuse_model(model, file.name)


def test_header_longer_than_the_file(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied()
    (file,) = shard_files(model)
    file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:])
    refuse_model(model, file.name)


@st.composite
def spoilt_files(draw: st.DrawFn) -> bytes:
    """A small safetensors file: sound, cut, or with header values or bytes replaced."""
    number = st.one_of(st.integers(-8, 40), st.sampled_from([2.0, 4.0, 1e300, True, "4", None]))
    junk = st.one_of(number, st.text(max_size=4), st.lists(number, max_size=3))
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }
    kind = draw(st.sampled_from(["offsets", "header", "bytes", "cut", "sound"]))
    if kind == "offsets":  # a tensor moved: a hole, an overlap, or a start before the data
        for entry in header.values():
            step = draw(st.sampled_from([-16, -8, 0, 8]))
            entry["data_offsets"] = [offset + step for offset in entry["data_offsets"]]
    for _ in range(draw(st.integers(1, 2)) if kind == "header" else 0):
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
        header[draw(st.sampled_from("ab"))][key] = draw(st.one_of(st.just(header["a"].get(key)), junk))
    raw = bytearray(with_header(header, bytes(range(draw(st.sampled_from([24, 24, 16, 32]))))))
    for _ in range(draw(st.integers(1, 3)) if kind == "bytes" else 0):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(0, len(raw)))] if kind == "cut" else raw)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=spoilt_files())
def test_what_is_accepted_reads_as_the_safetensors_library_reads_it(tmp_path: Path, raw: bytes) -> None:
    """Either the folder is refused with an InputError, or the safetensors library reads every byte alike."""
    (tmp_path / "model.safetensors").write_bytes(raw)
    try:
        folder = open_folder(tmp_path)
    except InputError:
        return
    try:
        with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
            assert set(handle.keys()) == set(folder.names)
            for name in folder.names:
                ours, theirs = folder.get(name), handle.get_tensor(name)
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
                assert ours.view(torch.uint8).tolist() == theirs.view(torch.uint8).tolist()
    except SafetensorError as error:
        pytest.fail(f"what the library refuses was accepted: {error}")


# --- the index


def test_index_that_leaves_the_folder(copied: Callable[..., Path], refuse_model: Refuse, tmp_path: Path) -> None:
    model = copied(shards=4)
    files = shard_files(model)
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in files[:3]:
        shutil.copy(file, outside)
    (model / "link.safetensors").symlink_to(outside / files[2].name)
    names = {
        files[0].name: f"../outside/{files[0].name}",
        files[1].name: str(outside / files[1].name),
        files[2].name: "link.safetensors",
    }
    edit_json(
        model / "model.safetensors.index.json",
        lambda index: index.update(weight_map={k: names.get(v, v) for k, v in index["weight_map"].items()}),
    )
    refuse_model(model, *names.values())


def test_single_file_that_is_a_link_out_of_the_folder(
    copied: Callable[..., Path], refuse_model: Refuse, tmp_path: Path
) -> None:
    model = copied()
    (file,) = shard_files(model)
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    refuse_model(model, file.name, "elsewhere.safetensors")


def test_hub_snapshot_links_are_no_offence(
    baby: Callable[..., Path], onecard: Callable[..., Result], tmp_path: Path, refused: Refuse
) -> None:
    """The hub's cache links its snapshots to blobs beside them. Those links are followed, and no others."""
    repository = tmp_path / "models--someone--baby"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    shutil.copytree(baby("llama4-text"), repository / "blobs")
    for blob in (repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    assert onecard("inspect", snapshot).exit_code == 0
    (file,) = shard_files(snapshot)
    (tmp_path / "stolen.safetensors").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "stolen.safetensors")
    refused(onecard("inspect", snapshot), file.name)


INDICES = {
    "cut": "{",
    "list": "[]",
    "empty": "{}",
    "map is a list": '{"weight_map": []}',
    "numbers": '{"weight_map": {"a": 1, "b": "x"}}',
    "lists": '{"weight_map": {"a": []}}',
    "names nothing": '{"weight_map": {}}',
    "no UTF-8": "\udcff\udcfe",
    "NUL": '{"weight_map": {"a": "x\\u0000y"}}',
    "long name": '{"weight_map": {"a": "' + "x" * 300 + '"}}',
}


@pytest.mark.parametrize("kind", INDICES)
def test_damaged_index(copied: Callable[..., Path], refuse_model: Refuse, kind: str) -> None:
    model = copied(shards=2)
    (model / "model.safetensors.index.json").write_bytes(INDICES[kind].encode(errors="surrogateescape"))
    refuse_model(model, model)


def test_index_promises_what_no_shard_holds(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied(shards=2)
    more = {"model.first.weight": shard_files(model)[0].name, "model.second.weight": shard_files(model)[1].name}
    edit_json(model / "model.safetensors.index.json", lambda index: index["weight_map"].update(more))
    refuse_model(model, *more)


def test_two_sets_of_weights(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    """transformers reads model.safetensors and other tools the index, so the folder is ambiguous and refused."""
    model = copied(shards=2)
    shutil.copy(shard_files(model)[0], model / "model.safetensors")
    refuse_model(model, "model.safetensors", "model.safetensors.index.json", "two sets")


def test_shards_without_an_index(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied(shards=2)
    (model / "model.safetensors.index.json").unlink()
    refuse_model(model, "model.safetensors.index.json", "fetch")


# --- weights against config.json


def test_shapes_that_contradict_the_config_are_all_named(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied()
    (file,) = shard_files(model)
    tensors = load_file(file)
    stem = "model.layers.0.feed_forward.experts"
    fused = tensors[f"{stem}.gate_up_proj"]
    tensors[f"{stem}.gate_up_proj"] = fused.transpose(1, 2).contiguous()
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
    del tensors["model.layers.1.feed_forward.router.weight"]
    tensors["model.layers.9.stranger"] = torch.ones(2)
    save_file(tensors, file)
    expected, found = list(fused.shape), list(fused.transpose(1, 2).shape)
    refuse_model(
        model,
        f"{stem}.gate_up_proj",
        expected,
        found,
        "model.norm.weight",
        [32],
        [64],
        "model.layers.1.feed_forward.router.weight",
        "model.layers.9.stranger",
    )


def test_config_of_another_size(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied("qwen3")
    edit_json(model / "config.json", lambda c: c.update(moe_intermediate_size=64))
    refuse_model(model, "model.layers.0.mlp.experts.0.down_proj.weight", [64, 32], [64, 64], "config.json")


def test_weights_that_are_no_floating_point(copied: Callable[..., Path], refuse_model: Refuse) -> None:
    model = copied()
    (file,) = shard_files(model)
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, file)
    refuse_model(model, "model.norm.weight", "F8_E4M3", "lm_head.weight", "I8")


@pytest.fixture
def not_finite(copied: Callable[..., Path]) -> Path:
    model = copied("scout")
    (file,) = shard_files(model)
    tensors = load_file(file)
    tensors["language_model.model.layers.1.feed_forward.experts.down_proj"][5, 3, 7] = float("nan")
    pair = tensors["vision_model.patch_embedding.linear.weight"][0]
    pair[0], pair[1] = float("inf"), float("-inf")
    save_file(tensors, file)
    return model


@pytest.mark.parametrize("method", ["best", "rtn"])
def test_nan_and_inf_are_all_named(not_finite: Path, refuse: Refuse, recipe: Callable[..., Path], method: str) -> None:
    said = refuse(not_finite, use=recipe(method=method))
    named = {line.split()[1]: line for line in said.splitlines() if line.startswith("  - ")}
    assert named.keys() == {
        "language_model.model.layers.1.feed_forward.experts.down_proj",
        "vision_model.patch_embedding.linear.weight",
    }
    assert "1 NaN" in named["language_model.model.layers.1.feed_forward.experts.down_proj"]
    assert "2 Inf" in named["vision_model.patch_embedding.linear.weight"]


def test_nan_leaves_what_should_have_been_overwritten(not_finite: Path, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("the last good run")
    (tmp_path / "out" / "onecard.json").write_text('{"files": ["config.json", "onecard.json"]}')
    refuse(not_finite, "NaN", arguments=["--overwrite"])
