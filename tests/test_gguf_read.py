"""GGUF folders that are damaged or contradict their config.json are refused; `check` finds what headers don't show."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize as by_gguf
from hypothesis import given
from hypothesis import strategies as st

from babies import edit_json
from command_line import refused, run_onecard
from gguf_files import export, make, quantize
from onecard.checkpoint.gguf import file as gguf_file
from onecard.checkpoint.gguf import write as gguf_write
from onecard.checkpoint.model import open_model
from onecard.checkpoint.packed import PackedSource
from onecard.core.errors import InputError
from onecard.models import gguf as words
from onecard.models.adapter import Adapter

FILE = gguf_write.FILE_NAME


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("read")
    return quantize(make(home / "source", "llama4-text"), home / "int4")


@pytest.fixture(scope="module")
def whole(int4: Path) -> Path:
    """A folder with a Llama 4 in Q4_0. Do not write into it."""
    folder, _ = export(int4, int4.parent / "gguf")
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_model(str(folder))
    return str(caught.value)


def place(folder: Path, name: str) -> tuple[int, int]:
    """A tensor's first byte in the file, and its length."""
    tensor = next(t for t in GGUFReader(folder / FILE).tensors if t.name == name)
    return int(tensor.data_offset), int(tensor.n_bytes)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("kept", [0, 3, 40, 5000, -1])
def test_a_file_that_is_cut_off_is_refused(copy: Path, kept: int) -> None:
    data = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(data[:kept] if kept >= 0 else data[:-33])
    assert FILE in refusal(copy)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("rms_norm_eps", 1e-6, "layer_norm_rms_epsilon"),
        ("num_key_value_heads", 4, "head_count_kv"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}, "rope_freqs.weight is there"),
        ("num_hidden_layers", 8, "block_count is 4, and config.json says 8"),
    ],
)
def test_a_config_of_another_model_is_refused(copy: Path, key: str, value: object, why: str) -> None:
    def change(config: dict[str, object]) -> None:
        config[key] = value
        if key == "num_hidden_layers":
            config |= {"no_rope_layers": [], "layer_types": None, "moe_layers": list(range(8))}

    edit_json(copy / "config.json", change)
    assert why in refusal(copy)


def written_with(int4: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> Path:
    """A GGUF folder with other metadata; None removes a key."""
    right = words.settings

    def settings(adapter: Adapter) -> dict[str, Any]:
        return {key: value for key, value in (right(adapter) | changes).items() if value is not None}

    with monkeypatch.context() as patch:
        patch.setattr(words, "settings", settings)
        return export(int4, folder)[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope.scaling.type": "yarn"}, "llama4.rope.scaling.type is yarn"),
        ({"rope.scaling.factor": 4.0}, "llama4.rope.scaling.factor is 4.0"),
        ({"rope.scale_linear": 4.0}, "llama4.rope.scale_linear is 4.0"),
    ],
)
def test_scaling_that_config_json_does_not_have_is_refused(
    changes: dict[str, Any], why: str, int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why in refusal(written_with(int4, tmp_path / "gguf", monkeypatch, changes))


def test_a_rotary_base_that_llama_cpp_would_guess_wrongly_is_refused(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written_with(int4, tmp_path / "gguf", monkeypatch, {"rope.freq_base": None})
    assert open_model(str(folder)).warnings  # the baby's base is what llama.cpp takes
    edit_json(folder / "config.json", lambda c: c["rope_parameters"].update(rope_theta=500000.0))
    assert "rope.freq_base is missing: llama.cpp takes 10000" in refusal(folder)


def test_metadata_that_nobody_here_knows_is_told_and_neutral_ones_are_not(
    int4: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neutral = {"rope.scaling.type": "none", "rope.scale_linear": 1.0, "rope.scaling.original_context_length": 77}
    folder = written_with(int4, tmp_path / "a", monkeypatch, neutral)
    assert len(open_model(str(folder)).warnings) == len(open_model(str(whole)).warnings)
    folder = written_with(int4, tmp_path / "b", monkeypatch, {"logit_scale": 0.5})
    assert any("llama4.logit_scale = 0.5" in warning for warning in open_model(str(folder)).warnings)


def test_other_rope_factors_than_the_config_gives_are_refused(copy: Path) -> None:
    at, _ = place(copy, words.ROPE_FACTORS)
    overwrite(copy / FILE, at, np.float32(8.0).tobytes())
    assert "other factors" in refusal(copy)


def test_two_files_and_another_architecture_are_refused(copy: Path) -> None:
    shutil.copy(copy / FILE, copy / "second.gguf")
    assert "2 GGUF files" in refusal(copy)
    (copy / "second.gguf").unlink()
    (copy / FILE).write_bytes(gguf_file.header("llama", {"general.name": "other"}, []))
    assert "general.architecture" in refusal(copy)


def test_a_link_that_leaves_the_folder_is_refused(copy: Path) -> None:
    (copy / FILE).rename(copy.parent / "elsewhere.gguf")
    (copy / FILE).symlink_to(copy.parent / "elsewhere.gguf")
    assert "leaves the folder" in refusal(copy)


def test_a_setting_that_is_no_number_is_refused(copy: Path) -> None:
    (copy / FILE).write_bytes(gguf_file.header("llama4", {"llama4.block_count": "four"}, []))
    assert "llama4.block_count is four, and config.json says 4" in refusal(copy)


def test_every_missing_or_misshapen_tensor_is_named(copy: Path) -> None:
    reader = GGUFReader(copy / FILE)
    writer = GGUFWriter(copy / FILE, "llama4")
    for tensor in list(reader.tensors)[3:]:
        data = np.array(tensor.data)
        writer.add_tensor(tensor.name, data[:-1] if "attn_q" in tensor.name else data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(4, np.float32))
    del reader
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = refusal(copy)
    assert text.count("is missing") == 3
    assert text.count("attn_q.weight is [63, 64], and config.json says [64, 64]") == 4
    assert "blk.0.attn_q.bias is in the file" in text


def test_other_block_types_are_read_as_the_gguf_package_unpacks_them(copy: Path) -> None:
    """Another tool's file: one tensor in Q5_0, which onecard never writes."""
    reader = GGUFReader(copy / FILE)
    writer = GGUFWriter(None, "llama4")
    wanted = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    for tensor in reader.tensors:
        if tensor.name == "blk.1.attn_output.weight":
            packed = by_gguf(wanted, GGMLQuantizationType.Q5_0)
            writer.add_tensor(tensor.name, packed, raw_dtype=GGMLQuantizationType.Q5_0)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    del reader
    writer.write_header_to_file(copy / FILE)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_model(str(copy))
    assert isinstance(model.source, PackedSource)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert (model.source.label, model.source.weights[name].width) == ("gguf Q4_0 and Q5_0", "Q5_0")
    assert model.source.quantized(name) is None
    # 5 bits: a step is a sixteenth of a block's largest value.
    assert float((model.source.get(name) - torch.from_numpy(wanted)).abs().max()) < 4 / 16


def test_a_file_can_be_exported_from_again_without_a_code_being_changed(whole: Path, tmp_path: Path) -> None:
    for path in whole.parent.glob("source/*token*"):
        shutil.copy(path, tmp_path)
    model = open_model(str(whole))
    planned = gguf_write.plan(model.adapter, model.source, tmp_path, "again")
    gguf_write.write(planned, model.adapter, model.source, tmp_path / FILE)
    first, second = (GGUFReader(folder / FILE) for folder in (whole, tmp_path))
    assert [t.name for t in first.tensors] == [t.name for t in second.tensors]
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert np.array_equal(a.data, b.data)


def test_a_header_is_read_as_the_gguf_package_reads_it(whole: Path) -> None:
    ours, theirs = gguf_file.open_file(whole / FILE), GGUFReader(whole / FILE)
    tensors = {t.name: (t.tensor_type.name, tuple(reversed(t.shape.tolist())), t.data_offset) for t in theirs.tensors}
    assert {name: (t.kind, t.shape, at) for name, (t, at) in ours.tensors.items()} == tensors
    scalars = {key: field.contents() for key, field in theirs.fields.items() if len(field.types) == 1}
    assert ours.metadata == {key: value for key, value in scalars.items() if not key.startswith("GGUF.")}
    assert {"tokenizer.chat_template", "tokenizer.ggml.add_bos_token", "llama4.rope.freq_base"} <= ours.metadata.keys()


def test_a_header_is_written_as_the_gguf_package_writes_it(tmp_path: Path) -> None:
    metadata = {
        "a.text": "x \N{SNOWMAN}",
        "a.whole": 7,
        "a.real": 0.5,
        "a.switch": True,
        "a.words": ["p", "qq", "\u0120r"],
        "a.numbers": [1, 3, -2],
    }
    tensors = [
        gguf_file.GgufTensor("one", "F32", (5,)),
        gguf_file.GgufTensor("two", "Q4_0", (3, 4, 64)),
        gguf_file.GgufTensor("three", "BF16", (7, 3)),
    ]
    writer = GGUFWriter(tmp_path / "theirs", "llama4")
    writer.add_string("a.text", metadata["a.text"])
    writer.add_uint32("a.whole", 7)
    writer.add_float32("a.real", 0.5)
    writer.add_bool("a.switch", True)
    writer.add_array("a.words", metadata["a.words"])
    writer.add_array("a.numbers", metadata["a.numbers"])
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    theirs = (tmp_path / "theirs").read_bytes()
    ours = gguf_file.header("llama4", metadata, tensors)
    assert ours[: len(theirs)] == theirs
    assert len(ours) % 32 == 0
    assert not any(ours[len(theirs) :])


@given(st.data())
def test_a_header_with_a_spoilt_byte_is_read_or_refused_and_never_worse(whole: Path, data: st.DataObject) -> None:
    content = bytearray((whole / FILE).read_bytes())
    header = min(at for _, at in gguf_file.open_file(whole / FILE).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    spoilt = whole.parent / "spoilt.gguf"
    spoilt.write_bytes(content)
    with suppress(ValueError):
        gguf_file.open_file(spoilt)


def test_check_finds_a_sound_file_sound(whole: Path) -> None:
    done = run_onecard("check", whole)
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout)
    assert line["sound"]
    # gate, up and down of 8 experts and the shared one, in 4 layers
    assert line["quantized_modules"] == 4 * 9 * 3


@pytest.mark.parametrize("what", ["nan", "zeros"])
def test_check_finds_what_the_header_hides(copy: Path, what: str) -> None:
    """Without a record nobody knows whether zeros are the original's: they are told, and no damage."""
    at, count = place(copy, "blk.2.ffn_down_exps.weight")
    each = count // 8
    block = np.float16("nan").tobytes() if what == "nan" else (np.float16(0).tobytes() + bytes(16)) * (each // 18)
    overwrite(copy / FILE, at + 5 * each, block)
    done = run_onecard("check", copy)
    assert done.exit_code == (1 if what == "nan" else 0)
    text = done.stdout + done.stderr
    assert "model.layers.2.feed_forward.experts.5.down_proj" in text
    assert ("non-finite" if what == "nan" else "all zeros") in text


def test_quantizing_a_gguf_folder_is_refused(whole: Path, tmp_path: Path, onecard: Callable[..., object]) -> None:
    refused(run_onecard("quantize", whole, tmp_path / "out", "--recipe", "rtn-int4"), "quantized already")


def test_generate_says_that_transformers_does_not_read_it(whole: Path) -> None:
    refused(run_onecard("generate", whole, "hello"), "holds GGUF", "llama.cpp", "--format bf16")
