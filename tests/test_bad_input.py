"""What bad input gets: one clean message with every offender and the way out, exit code 2, nothing written.

Every case goes through the real command line. A model that is unsound is refused alike by every verb that opens it.
"""

import json
import os
import pickle
import runpy
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from onecard.checkpoint.source import open_folder
from onecard.core.errors import InputError

Check = Callable[..., str]


@pytest.fixture
def refuse_model(onecard: Callable[..., Result], baby: Callable[..., Path], recipe: Callable[..., Path],
                 refuse: Check, texts: list[str], refused: Check) -> Check:  # fmt: skip
    """Every verb that opens MODEL refuses it with the same needles."""

    def check(model: Path, *needles: object) -> None:
        refuse(model, *needles)
        refused(onecard("inspect", model), *needles)
        refused(onecard("plan", model, "--recipe", recipe()), *needles)
        refused(onecard("verify", model, baby("llama4-text"), *texts[2:]), *needles)
        refused(onecard("verify", baby("llama4-text"), model, *texts[2:]), *needles)
        refused(onecard("generate", model, "hello"), *needles)

    return check


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shard_files(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- weights on disk


def test_missing_shards_are_all_named(copied: Callable[..., Path], refuse_model: Check) -> None:
    model = copied(shards=3)
    gone = shard_files(model)[1:]
    for shard in gone:
        shard.unlink()
    refuse_model(model, *(f"{shard.name} is missing" for shard in gone), "Fetch")


def test_truncated_shards_are_all_named(copied: Callable[..., Path], refuse_model: Check) -> None:
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
def test_damaged_header(copied: Callable[..., Path], refuse_model: Check, kind: str) -> None:
    model = copied()
    (file,) = shard_files(model)
    file.write_bytes(with_header(*HEADERS[kind](*header_of(file))))
    refuse_model(model, file.name)


def test_header_longer_than_the_file(copied: Callable[..., Path], refuse_model: Check) -> None:
    model = copied()
    (file,) = shard_files(model)
    file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:])
    refuse_model(model, file.name)


@st.composite
def spoilt_files(draw: st.DrawFn) -> bytes:
    """A small safetensors file with values of its header or some of its bytes replaced, or cut, or as it should be."""
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
    """A folder is refused with an InputError, or the library (the slow, obvious twin) agrees on every byte."""
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


def test_index_that_leaves_the_folder(copied: Callable[..., Path], refuse_model: Check, tmp_path: Path) -> None:
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
    copied: Callable[..., Path], refuse_model: Check, tmp_path: Path
) -> None:
    model = copied()
    (file,) = shard_files(model)
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    refuse_model(model, file.name, "elsewhere.safetensors")


def test_hub_snapshot_links_are_no_offence(
    baby: Callable[..., Path], onecard: Callable[..., Result], tmp_path: Path, refused: Check
) -> None:
    """The hub's cache keeps blobs beside its snapshots: those links must be followed, and no others."""
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
def test_damaged_index(copied: Callable[..., Path], refuse_model: Check, kind: str) -> None:
    model = copied(shards=2)
    (model / "model.safetensors.index.json").write_bytes(INDICES[kind].encode(errors="surrogateescape"))
    refuse_model(model, model)


def test_index_promises_what_no_shard_holds(copied: Callable[..., Path], refuse_model: Check) -> None:
    model = copied(shards=2)
    more = {"model.first.weight": shard_files(model)[0].name, "model.second.weight": shard_files(model)[1].name}
    edit_json(model / "model.safetensors.index.json", lambda index: index["weight_map"].update(more))
    refuse_model(model, *more)


def test_shards_without_an_index(copied: Callable[..., Path], refuse_model: Check) -> None:
    model = copied(shards=2)
    (model / "model.safetensors.index.json").unlink()
    refuse_model(model, "model.safetensors.index.json", "fetch")


# --- weights against config.json


def test_shapes_that_contradict_the_config_are_all_named(copied: Callable[..., Path], refuse_model: Check) -> None:
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
        model, f"{stem}.gate_up_proj", expected, found, "model.norm.weight", [32], [64],
        "model.layers.1.feed_forward.router.weight", "model.layers.9.stranger",
    )  # fmt: skip


def test_config_of_another_size(copied: Callable[..., Path], refuse_model: Check) -> None:
    model = copied("qwen3")
    edit_json(model / "config.json", lambda c: c.update(moe_intermediate_size=64))
    refuse_model(model, "model.layers.0.mlp.experts.0.down_proj.weight", [64, 32], [64, 64], "config.json")


def test_weights_that_are_no_floating_point(copied: Callable[..., Path], refuse_model: Check) -> None:
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


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_nan_and_inf_are_all_named(not_finite: Path, refuse: Check, recipe: Callable[..., Path], method: str) -> None:
    said = refuse(not_finite, use=recipe(method=method))
    named = {line.split()[1]: line for line in said.splitlines() if line.startswith("  - ")}
    assert named.keys() == {
        "language_model.model.layers.1.feed_forward.experts.down_proj",
        "vision_model.patch_embedding.linear.weight",
    }
    assert "1 NaN" in named["language_model.model.layers.1.feed_forward.experts.down_proj"]
    assert "2 Inf" in named["vision_model.patch_embedding.linear.weight"]


def test_nan_leaves_what_should_have_been_overwritten(not_finite: Path, refuse: Check, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("the last good run")
    refuse(not_finite, "NaN", arguments=["--overwrite"])


# --- config.json


def test_unknown_model_type(copied: Callable[..., Path], refuse_model: Check) -> None:
    model = copied()
    edit_json(model / "config.json", lambda c: c.update(model_type="mixtral"))
    refuse_model(model, "mixtral", "llama4", "qwen3_moe")


@pytest.mark.parametrize("content", [None, "{", "[]", "null", b"\xff"])
def test_config_that_is_no_config(copied: Callable[..., Path], refuse_model: Check, content: str | bytes) -> None:
    model = copied()
    if content is None:
        (model / "config.json").unlink()
    else:
        (model / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse_model(model, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None},
        {"model_type": ["llama4"]},
        {"hidden_size": "many"},
        {"hidden_act": "nonsense"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_hidden_layers": -1},
        {"num_local_experts": 0},
        {"num_experts_per_tok": 99},
        {"vocab_size": -5},
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
        {"quantization_config": []},
        {"quantization_config": {}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        {"auto_map": 5},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_config_with_a_senseless_value(
    copied: Callable[..., Path], refuse_model: Check, changes: dict[str, Any]
) -> None:
    model = copied()
    edit_json(model / "config.json", lambda c: c.update(changes))
    refuse_model(model, model)


# --- code that must never run


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_pickles_are_named_and_never_unpickled(
    copied: Callable[..., Path], refuse_model: Check, tmp_path: Path
) -> None:
    model = copied()
    shutil.rmtree(tmp_path / "mark", ignore_errors=True)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    torch.save(Evil(tmp_path / "mark"), model / "consolidated.00.pth")
    refuse_model(model, "pytorch_model.bin", "consolidated.00.pth", "safetensors")
    assert not (tmp_path / "mark").exists()
    pickle.loads((model / "pytorch_model.bin").read_bytes())  # the trap was a real one
    assert (tmp_path / "mark").exists()


def test_a_pickle_beside_safetensors_is_left_alone(
    copied: Callable[..., Path], onecard: Callable[..., Result], recipe: Callable[..., Path], texts: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    model = copied()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    result = onecard("quantize", model, tmp_path / "out", "--recipe", recipe(method="rtn"), *texts)
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "mark").exists()
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.fixture
def evil_code(tmp_path: Path) -> Iterator[str]:
    """Python that leaves a mark when it is imported; afterwards proof that it would have, and did not."""
    code = f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\nclass EvilConfig: pass\nclass EvilTokenizer: pass\n"
    yield code
    assert not (tmp_path / "mark").exists()
    (tmp_path / "evil.py").write_text(code)
    runpy.run_path(str(tmp_path / "evil.py"))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("model_type", ["llama4_text", "evil"])
def test_remote_code_of_the_model_is_never_run(
    copied: Callable[..., Path], refuse_model: Check, evil_code: str, model_type: str
) -> None:
    model = copied()
    (model / "modeling_evil.py").write_text(evil_code)
    auto_map = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    edit_json(model / "config.json", lambda c: c.update(model_type=model_type, auto_map=auto_map))
    refuse_model(model, "auto_map", "AutoConfig", "AutoModelForCausalLM", "remote code")


def test_remote_code_of_the_tokenizer_is_never_run(
    copied: Callable[..., Path], onecard: Callable[..., Result], recipe: Callable[..., Path], texts: list[str],
    evil_code: str, tmp_path: Path, refused: Check,
) -> None:  # fmt: skip
    """It is refused, or the plain tokenizer.json is used in its stead; the code does not run and is not carried."""
    model = copied()
    (model / "tokenization_evil.py").write_text(evil_code)
    auto_map = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]}
    edit_json(model / "tokenizer_config.json", lambda c: c.update(tokenizer_class="EvilTokenizer", auto_map=auto_map))
    result = onecard("quantize", model, tmp_path / "out", "--recipe", recipe(method="rtn"), *texts)
    if result.exit_code:
        refused(result, model)
    assert not list(tmp_path.glob("out/*.py"))


# --- tokenizers


def test_tokenizer_that_is_missing_or_damaged(copied: Callable[..., Path], refuse: Check) -> None:
    model = copied()
    (model / "tokenizer.json").write_text('{"version": "1.0", "model"')
    refuse(model, model, "tokenizer")
    for path in model.glob("tokenizer*"):
        path.unlink()
    refuse(model, model, "tokenizer")


def test_tokenizer_of_another_model(copied: Callable[..., Path], refuse: Check) -> None:
    model = copied()

    def shift(tokenizer: Any) -> None:
        tokenizer["model"]["vocab"]["a"] = 4000

    edit_json(model / "tokenizer.json", shift)
    refuse(model, model, "tokenizer", "vocabulary")


# --- recipes


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"colour": "red", "grupsize": 32}, ["colour: unknown key", "grupsize: unknown key", "group_size"]),
        ({"bits": 3, "method": "magic"}, ["bits", "method"]),
        ({"group_size": 12}, ["group_size", "12"]),
        ({"group_size": 0}, ["group_size"]),
        ({"quantize_roles": []}, ["quantize_roles"]),
        ({"quantize_roles": ["expert", "router"]}, ["quantize_roles"]),
        ({"damping": 0, "calibration_rows": 0}, ["damping", "calibration_rows"]),
        ({"damping": float("nan")}, ["damping"]),
        ({"shrinkage": float("inf")}, ["shrinkage"]),
        ({"calibration": {"source": "demo", "sheet": 3}}, ["calibration.sheet"]),
        ({"name": None}, ["name"]),
        ({"family": "qwen3_moe"}, ["qwen3_moe", "llama4"]),
        ({"keep_modules": ["*.nowhere.*", "*nothing*"]}, ["*.nowhere.*", "*nothing*"]),
        ({"keep_modules": ["*.layers.0.*.experts.3.*"]}, ["model.layers.0.feed_forward.experts"]),
        (
            {"keep_modules": ["*.0.*.q_proj", "*.1.*.experts.3.gate_proj"], "quantize_roles": ["expert", "attention"]},
            ["model.layers.0.self_attn.q_proj", "model.layers.1.feed_forward.experts.3.gate_proj"],
        ),
        ({"group_size": 64}, ["group_size 64", "96"]),
        ({"group_size": 40, "keep_modules": ["*nothing*"]}, ["group_size 40", "64", "96", "*nothing*"]),
        ({"quantize_roles": ["mlp"]}, ["mlp"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_recipe_that_cannot_be_used(
    baby: Callable[..., Path], refuse: Check, recipe: Callable[..., Path], onecard: Callable[..., Result],
    changes: dict[str, Any], needles: list[str], refused: Check,
) -> None:  # fmt: skip
    use = recipe(**changes)
    refuse(baby("llama4-text"), *needles, use=use)
    refused(onecard("plan", baby("llama4-text"), "--recipe", use), *needles)


@pytest.mark.parametrize(
    "text", ["name: [", "", "- a\n- b\n", "!!python/object/apply:os.mkdir [{marker}]\n", "a: &a [*a]\n", "\x00"],
    ids=["cut", "empty", "list", "python tag", "loop", "NUL"],
)  # fmt: skip
def test_recipe_that_is_no_recipe(baby: Callable[..., Path], refuse: Check, tmp_path: Path, text: str) -> None:
    path = tmp_path / "strange.yaml"
    path.write_text(text.replace("{marker}", str(tmp_path / "mark")))
    refuse(baby("llama4-text"), "strange.yaml", use=path)
    assert not (tmp_path / "mark").exists()


def test_recipe_that_does_not_exist(
    baby: Callable[..., Path], refuse: Check, onecard: Callable[..., Result], tmp_path: Path, refused: Check
) -> None:
    refuse(baby("llama4-text"), "'scuot'", "llama4-scout-h100", "rtn-int4", use="scuot")
    refused(onecard("recipes", "scuot"), "'scuot'", "llama4-scout-h100")
    refuse(baby("llama4-text"), "none.yaml", use=tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    refuse(baby("llama4-text"), "folder.yaml", use=tmp_path / "folder.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9".encode("latin-1"))
    refuse(baby("llama4-text"), "latin.yaml", use=tmp_path / "latin.yaml")


# --- paths


@pytest.mark.parametrize("where", ["inside MODEL", "MODEL itself", "a link into MODEL", "MODEL inside OUT"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]], ids=lambda f: "".join(f) or "fresh")
def test_out_and_model_lie_in_each_other(
    copied: Callable[..., Path], refuse: Check, tmp_path: Path, where: str, flags: list[str]
) -> None:
    model = copied()
    (tmp_path / "link").symlink_to(model)
    out = {"inside MODEL": model / "int4", "MODEL itself": model, "a link into MODEL": tmp_path / "link" / "int4",
           "MODEL inside OUT": tmp_path}[where]  # fmt: skip
    refuse(model, out, model, out=out, arguments=flags)


def test_out_is_not_empty(baby: Callable[..., Path], refuse: Check, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    refuse(baby("llama4-text"), tmp_path / "out", "--resume", "--overwrite")
    refuse(baby("llama4-text"), "--resume", "--overwrite", arguments=["--resume", "--overwrite"])


def test_nothing_to_resume_in_a_foreign_folder(baby: Callable[..., Path], refuse: Check, tmp_path: Path) -> None:
    """--resume goes on with a run of onecard's; a folder of somebody's that no run of ours made is not one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "precious"}')
    refuse(baby("llama4-text"), tmp_path / "out", arguments=["--resume"])


def test_out_or_work_is_a_file_or_under_one(baby: Callable[..., Path], refuse: Check, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    refuse(baby("llama4-text"), file, out=file)
    refuse(baby("llama4-text"), file, out=file / "out")
    refuse(baby("llama4-text"), file, arguments=["--work", file])
    refuse(baby("llama4-text"), file, arguments=["--work", file / "work"])


@pytest.mark.parametrize("out", [".", "/", ".."])
def test_out_without_a_name(
    baby: Callable[..., Path], refuse: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """OUT.work has to lie somewhere: such a folder is refused in words (it is not empty, too)."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    refuse(baby("llama4-text"), out, out=out)


@pytest.mark.parametrize("where", ["WORK is OUT", "OUT inside WORK", "WORK inside MODEL", "WORK is MODEL"])
def test_work_lies_where_it_must_not(
    copied: Callable[..., Path], refuse: Check, recipe: Callable[..., Path], tmp_path: Path, where: str
) -> None:
    """WORK is removed when a run ends, with all that lies in it; and nothing may be written into MODEL."""
    model, work = copied(), tmp_path / "work"
    out, work = {
        "WORK is OUT": (work, work),
        "OUT inside WORK": (work / "out", work),
        "WORK inside MODEL": (tmp_path / "out", model / "work"),
        "WORK is MODEL": (tmp_path / "out", model),
    }[where]
    refuse(model, work, use=recipe(method="rtn"), out=out, arguments=["--work", work])


def test_a_model_that_is_not_there(
    baby: Callable[..., Path], refuse: Check, onecard: Callable[..., Result], tmp_path: Path, refused: Check
) -> None:
    refuse(tmp_path / "no" / "such" / "model", tmp_path / "no", "demo", "hub id")
    refuse(baby("llama4-text") / "model.safetensors", "model.safetensors", "folder")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", tmp_path / "empty", "config.json")
    refused(onecard("verify", baby("llama4-text"), tmp_path / "no"), tmp_path / "no")


def test_hub_id_on_an_offline_machine(refuse: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse("someone/who-is-not-here", "someone/who-is-not-here", "network", "folder", code=4)


@pytest.mark.parametrize("device", ["tpu9", "meta", "mps", "", "cpu:x", "cuda:99"])
def test_unknown_device(baby: Callable[..., Path], refuse: Check, device: str) -> None:
    refuse(baby("llama4-text"), "device", "cpu", arguments=["--device", device])


# --- checkpoints that are quantized already


def test_quantized_already(
    emitted: Callable[..., Any],
    refuse: Check,
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    refused: Check,
) -> None:
    checkpoint, _ = emitted("qwen3")
    refuse(checkpoint, checkpoint, "quantized already", "original")
    refused(onecard("plan", checkpoint, "--recipe", recipe()), checkpoint, "quantized already")


def _drop_scales(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for module in modules:
        del tensors[f"{module}.weight_scale"]


def _cut_scales(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for module in modules:
        tensors[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"][:5].contiguous()


def _no_groups(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for module in modules:
        tensors[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"][:, :0].contiguous()


def _flat_codes(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for module in modules:
        tensors[f"{module}.weight_packed"] = tensors[f"{module}.weight_packed"].flatten()


def _narrow_codes(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for module in modules:
        tensors[f"{module}.weight_packed"] = tensors[f"{module}.weight_packed"][:, :2].contiguous()


def _no_module(tensors: dict[str, torch.Tensor], modules: list[str]) -> None:
    for name in [n for n in tensors if n.rpartition(".")[0] in modules]:
        del tensors[name]


@pytest.mark.parametrize("spoil", [_drop_scales, _cut_scales, _no_groups, _flat_codes, _narrow_codes, _no_module])
def test_damaged_quantized_checkpoint(
    baby: Callable[..., Path], emitted: Callable[..., Any], onecard: Callable[..., Result], texts: list[str],
    tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor], list[str]], None], refused: Check,
) -> None:  # fmt: skip
    """Two modules of an emitted checkpoint are spoilt: `verify` and `inspect` name both and compute nothing."""
    checkpoint = Path(shutil.copytree(emitted("qwen3")[0], tmp_path / "checkpoint"))
    stem = "model.layers.0.mlp.experts"
    modules = [f"{stem}.2.down_proj", f"{stem}.5.gate_proj"]
    for shard in shard_files(checkpoint):
        tensors = load_file(shard)
        if f"{modules[0]}.weight_packed" in tensors:
            spoil(tensors, modules)
            save_file(tensors, shard, metadata={"format": "pt"})
    if spoil in (_drop_scales, _no_module):  # the index then names too much: it is not what is tested here
        edit_json(
            checkpoint / "model.safetensors.index.json",
            lambda index: [index["weight_map"].pop(f"{m}.{s}") for m in modules for s in (
                ["weight_scale"] if spoil is _drop_scales else ["weight_packed", "weight_scale", "weight_shape"])],
        )  # fmt: skip
    refused(onecard("inspect", checkpoint), *modules)
    refused(onecard("verify", baby("qwen3"), checkpoint, *texts[2:]), *modules)


def test_verify_refuses_scales_that_are_no_numbers(
    baby: Callable[..., Path], emitted: Callable[..., Any], onecard: Callable[..., Result], texts: list[str],
    tmp_path: Path, refused: Check,
) -> None:  # fmt: skip
    checkpoint = Path(shutil.copytree(emitted("qwen3")[0], tmp_path / "checkpoint"))
    name = "model.layers.0.mlp.experts.2.down_proj.weight_scale"
    for shard in shard_files(checkpoint):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][3, 0] = float("nan")
            save_file(tensors, shard, metadata={"format": "pt"})
    refused(onecard("verify", baby("qwen3"), checkpoint, *texts[2:]), name, "NaN")


def test_verify_refuses_a_checkpoint_of_another_model(
    baby: Callable[..., Path],
    emitted: Callable[..., Any],
    onecard: Callable[..., Result],
    texts: list[str],
    refused: Check,
) -> None:
    checkpoint, _ = emitted("qwen3")
    refused(onecard("verify", baby("llama4-text"), checkpoint, *texts[2:]), checkpoint, baby("llama4-text"))


def test_generate_refuses_a_picture_that_is_not_there(
    baby: Callable[..., Path], onecard: Callable[..., Result], tmp_path: Path, refused: Check
) -> None:
    picture = tmp_path / "cat.png"
    refused(onecard("generate", baby("scout"), "what?", "--image", picture), picture)
    picture.write_bytes(b"no picture")
    refused(onecard("generate", baby("scout"), "what?", "--image", picture), picture)
    refused(onecard("generate", baby("qwen3"), "what?", "--image", picture), "vision")
