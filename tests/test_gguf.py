"""A checkpoint as a GGUF file: the gguf package and our own walk read it, and what it cannot hold is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from tokenizers import Tokenizer

import foreign
from babies import edit_json
from command_line import run_onecard
from gguf_files import SPECIAL, TEXTS, export, make, quantize, write_bpe
from onecard.checkpoint.gguf import tokenizer as tokenizers
from onecard.checkpoint.gguf import write as gguf_write
from onecard.checkpoint.model import Model, open_model
from onecard.checkpoint.packed import PackedSource
from onecard.core.errors import InputError
from onecard.core.tensors import CPU, Stored, pageable
from onecard.models import gguf as words
from onecard.models.adapter import Role, read
from walking import make_rows, walk_logits

FAMILIES = ("scout", "maverick", "qwen3")
# Method and scheme of a run -> the GGUF type of its matrices.
SCHEMES: dict[str, dict[str, Any]] = {
    "Q4_0": {},
    "Q4_1": {"symmetric": False},
    "Q8_0": {"bits": 8},
    "Q4_0 of rows": {"group_size": -1},
}
CASES = [*((family, "Q4_0") for family in FAMILIES), ("scout", "Q4_1"), ("qwen3", "Q8_0"), ("maverick", "Q4_0 of rows")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(family, kind) -> a quantized baby, or with the kind '' the original. Do not write into it."""
    home, done = tmp_path_factory.mktemp("gguf"), {}

    def get(family: str, kind: str = "") -> Path:
        if (family, kind) not in done:
            out = home / f"{family}-{kind.replace(' ', '-')}"
            done[family, kind] = (
                quantize(get(family), out, **SCHEMES[kind]) if kind else make(home / f"{family}-source", family)
            )
        return done[family, kind]

    return get


@pytest.fixture(scope="module")
def exported(made: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(family, kind) -> the folder with its GGUF file, and the model it was made from. Do not write into it."""
    home, done = tmp_path_factory.mktemp("exported"), {}

    def get(family: str, kind: str) -> tuple[Path, Model]:
        if (family, kind) not in done:
            done[family, kind] = export(made(family, kind), home / f"{family}-{kind.replace(' ', '-')}")
        return done[family, kind]

    return get


def stored(folder: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Name -> (type, values or bytes in torch's shape) by the gguf package."""
    reader = GGUFReader(folder / gguf_write.FILE_NAME)
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in reader.tensors}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_gguf_package_reads_the_weights_that_went_in(exported: Callable[..., Any], family: str, kind: str) -> None:
    folder, model = exported(family, kind)
    found, adapter, source = stored(folder), model.adapter, model.source
    assert isinstance(source, PackedSource)
    seen = set()
    for entry in words.layout(adapter):
        type_, values = found.pop(entry.name)
        if not set(entry.parts) & source.weights.keys():
            wanted = read(adapter, source, entry.parts[0])
            assert type_ == ("F32" if entry.full else "BF16")
            got = torch.from_numpy(values) if entry.full else torch.from_numpy(values).view(torch.bfloat16)
            assert torch.equal(got.to(wanted.dtype), wanted), entry.name
            continue
        assert type_ == kind.split()[0]
        unpacked = torch.from_numpy(np.array(dequantize(values, GGMLQuantizationType[type_])))
        assert unpacked.shape == entry.shape
        for expert, part in enumerate(entry.parts):
            weight = source.quantized(part)
            assert weight is not None
            got, wanted = unpacked[expert] if entry.stacked else unpacked, weight.dequantize()
            step = weight.scales.float().abs().max()
            slack = 0.0 if type_ != "Q4_1" else float(15 * step) * 2**-11
            assert float((got - wanted).abs().max()) <= slack, part
        seen |= set(entry.parts)
    assert seen == {name for name in source.weights if adapter.role(name) is not Role.VISION}
    assert set(found) == ({words.ROPE_FACTORS} if family != "qwen3" else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_have_the_names_that_the_gguf_package_gives_them(made: Callable[..., Path], family: str) -> None:
    adapter = open_model(str(made(family))).adapter
    arch = MODEL_ARCH.QWEN3MOE if family == "qwen3" else MODEL_ARCH.LLAMA4
    theirs = get_tensor_name_map(arch, adapter.n_blocks)
    for entry in words.layout(adapter):
        name = entry.parts[0].removeprefix("language_model.").replace(".experts.0.", ".experts.")
        assert theirs.get_name(name, try_suffixes=(".weight",)) == entry.name
    parts = [part for entry in words.layout(adapter) for part in entry.parts]
    text = [name for name in adapter.expected() if adapter.role(name) is not Role.VISION]
    assert sorted(parts) == sorted(text)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_our_own_walk_over_the_file_is_the_one_over_the_checkpoint(
    exported: Callable[..., Any], family: str, kind: str
) -> None:
    folder, model = exported(family, kind)
    opened = open_model(str(folder))
    rows = make_rows(opened.adapter)
    ours = walk_logits(opened.adapter, opened.source, rows)
    theirs = walk_logits(model.adapter, Exact(model.source), rows)
    for a, b in zip(ours, theirs, strict=True):
        if kind == "Q4_1":
            assert float((a - b).norm() / b.norm()) < 5e-3
        else:
            assert torch.allclose(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


class Exact:
    """A PackedSource whose weights are the products of codes and scales in fp32, not rounded to the dtype of the
    scales."""

    def __init__(self, source: PackedSource) -> None:
        self.source, self.names = source, source.names

    def info(self, name: str) -> Any:
        info = self.source.info(name)
        return type(info)(info.shape, "F32") if name in self.source.weights else info

    def get(self, name: str, index: Any = ()) -> torch.Tensor:
        return self.stored(name, index).on(CPU)

    def stored(self, name: str, index: Any = (), allocate: Any = pageable) -> Stored:
        if name not in self.source.weights:
            return self.source.stored(name, index, allocate)
        weight = self.source.quantized(name)
        assert weight is not None
        return Stored({name: weight.dequantize()[index]}, lambda parts: parts[name])


def test_an_original_is_written_as_it_is_and_verifies_to_nothing(made: Callable[..., Path], tmp_path: Path) -> None:
    folder, _ = export(made("scout"), tmp_path / "plain")
    assert {kind for kind, _ in stored(folder).values()} == {"BF16", "F32"}
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    recipe = made("scout", "Q4_0").with_suffix(".yaml")
    done = run_onecard("verify", made("scout"), folder, "--recipe", recipe, "--evaluation", texts)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kl_mean_nats"] == pytest.approx(0, abs=1e-12)
    assert "no vision tower" in done.stderr


def test_the_verb_writes_what_it_planned_and_check_finds_it_sound(made: Callable[..., Path], tmp_path: Path) -> None:
    source, out = made("scout", "Q4_1"), tmp_path / "out"
    planned = run_onecard("export", source, "--format", "gguf", "-o", out, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    done = run_onecard("export", source, "--format", "gguf", "-o", out)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["files"] == json.loads(planned.stdout)["files"] == {"model.gguf": (out / "model.gguf").stat().st_size}
    assert "mmproj" in " ".join(told["warnings"])
    assert "contexts of at most 7 tokens" in " ".join(json.loads((out / "onecard.json").read_text())["warnings"])
    assert run_onecard("check", out).exit_code == 0
    edit_json(out / "onecard.json", lambda r: r["export"]["matrices"].update(Q4_1=3))
    (out / "SHA256SUMS").unlink()
    broken = run_onecard("check", out)
    assert "onecard.json says 3" in broken.stderr


def test_a_recipe_may_end_in_a_gguf_file(made: Callable[..., Path], tmp_path: Path) -> None:
    """The codes equal those of the run in compressed-tensors, and the run's own verification reads the file."""
    out = quantize(made("scout"), tmp_path / "out", format="gguf")
    assert sorted(path.name for path in out.glob("*.gguf")) == ["model.gguf"]
    assert not list(out.glob("*.safetensors"))
    assert run_onecard("check", out).exit_code == 0
    record = json.loads((out / "onecard.json").read_text())
    assert record["kl"]["kl_mean_nats"] > 0
    assert record["export"]["matrices"] == {"Q4_0": 4 * 9 * 3}
    wanted = open_model(str(made("scout", "Q4_0"))).source
    found = open_model(str(out)).source
    assert isinstance(wanted, PackedSource)
    assert isinstance(found, PackedSource)
    for name in wanted.weights:
        a, b = wanted.quantized(name), found.quantized(name.removeprefix("language_model."))
        assert a is not None
        assert b is not None
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scales.float(), b.scales.float())


def test_floats_of_codes_are_their_weights_in_fp32(made: Callable[..., Path], tmp_path: Path) -> None:
    folder, model = export(made("qwen3", "Q4_0"), tmp_path / "floats", "F32")
    found = stored(folder)
    assert {kind for kind, _ in found.values()} == {"F32"}
    entry = next(entry for entry in words.layout(model.adapter) if entry.stacked)
    assert isinstance(model.source, PackedSource)
    weight = model.source.quantized(entry.parts[3])
    assert weight is not None
    assert torch.equal(torch.from_numpy(found[entry.name][1][3]), weight.dequantize())


def metadata(folder: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(folder / gguf_write.FILE_NAME).fields.items()}


def test_the_metadata_says_what_llama_cpp_asks_for(exported: Callable[..., Any]) -> None:
    folder, _ = exported("maverick", "Q4_0")
    said = metadata(folder)
    wanted = {
        "general.architecture": "llama4",
        "general.file_type": 2,
        "llama4.block_count": 4,
        "llama4.embedding_length": 64,
        "llama4.feed_forward_length": 160,
        "llama4.expert_feed_forward_length": 96,
        "llama4.attention.head_count": 4,
        "llama4.attention.head_count_kv": 2,
        "llama4.attention.key_length": 16,
        "llama4.rope.dimension_count": 16,
        "llama4.rope.freq_base": 10000.0,
        "llama4.expert_count": 8,
        "llama4.expert_used_count": 1,
        "llama4.interleave_moe_layer_step": 2,
        "llama4.vocab_size": 256,
        # The chunk and the temperature's floor are 8; the last of 8 positions has another temperature.
        "llama4.context_length": 7,
    }
    assert {key: said.get(key) for key in wanted} == wanted
    assert said["llama4.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    factors = stored(folder)[words.ROPE_FACTORS][1]
    # Wavelengths over 32 positions become 16 times as long, the others stay.
    waves = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    assert factors.tolist() == [16.0 if wave > 32 else 1.0 for wave in waves]


@pytest.mark.parametrize(
    ("split", "ignore", "name"),
    [
        (tokenizers.QWEN2, False, "qwen2"),
        (tokenizers.LLAMA3, False, "smaug-bpe"),
        (tokenizers.LLAMA3, True, "llama-bpe"),
        (tokenizers.LLAMA4, False, "llama4"),
        (r"\w+|\W", False, "gpt-2"),
    ],
)
def test_the_tokenizer_is_all_there(tmp_path: Path, split: str, ignore: bool, name: str) -> None:
    write_bpe(tmp_path, split, ignore)
    told = tokenizers.describe(tmp_path, 256, [1, 2])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    said = told.metadata
    assert said["ggml.pre"] == name
    assert bool(told.warnings) == (name == "gpt-2")
    assert not told.problems
    tokens, types = said["ggml.tokens"], said["ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    known = tokenizer.get_vocab_size()
    assert tokens[:known] == [tokenizer.id_to_token(i) for i in range(known)]
    assert types == [3] * len(SPECIAL) + [1] * (known - len(SPECIAL)) + [5] * (256 - known)
    assert len(set(tokens)) == len(tokens) == 256
    pairs = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert said["ggml.merges"] == [" ".join(pair) for pair in pairs]
    ids = {key: said.get(f"ggml.{key}") for key in ("bos_token_id", "eos_token_id", "eot_token_id", "padding_token_id")}
    assert ids == {"bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 2, "padding_token_id": 2}
    assert (said["ggml.add_bos_token"], said["ggml.add_eos_token"]) == (True, False)
    assert "messages" in str(said["chat_template"])


def test_tokens_of_one_text_under_two_numbers_are_refused(tmp_path: Path) -> None:
    write_bpe(tmp_path)
    twin = {"id": 200, "content": "a", "special": False, "normalized": False}
    edit_json(tmp_path / "tokenizer.json", lambda t: t["added_tokens"].append(twin))
    assert tokenizers.describe(tmp_path, 256, []).problems == ["tokenizer.json has the same token under two numbers: a"]


def refused_plan(folder: Path) -> str:
    model = open_model(str(folder))
    with pytest.raises(InputError) as caught:
        gguf_write.plan(model.adapter, model.source, model.path, "baby")
    problems = gguf_write.problems_of(model.adapter, model.source, model.path)
    assert problems
    assert all(problem in str(caught.value) for problem in problems)
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "key", "value", "why"),
    [
        ("qwen3", "norm_topk_prob", False, "norm_topk_prob is false"),
        ("qwen3", "use_sliding_window", True, "use_sliding_window"),
        ("scout", "use_qk_norm", False, "use_qk_norm is False with 8 experts"),
        ("scout", "no_rope_layers", [1, 1, 0, 1], "layers without rope"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    made: Callable[..., Path], tmp_path: Path, family: str, key: str, value: object, why: str
) -> None:
    folder = Path(shutil.copytree(made(family), tmp_path / "model"))
    edit_json(folder / "config.json", lambda c: c.get("text_config", c).update({key: value}))
    assert why in refused_plan(folder)


def test_dense_layers_and_their_tokenizer_are_refused_in_one_message(baby: Callable[..., Path]) -> None:
    text = refused_plan(
        baby("qwen3", 2)
    )  # its second layer has no experts, and its tokenizer has one token for each letter
    assert "its layers [1] have no experts" in text
    assert "byte-level BPE" in text


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"group_size": 16}, "groups of 16"), ({"bits": 8, "symmetric": False}, "int8 codes with zero points")],
)
def test_codes_without_a_block_type_are_refused(
    made: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    assert why in refused_plan(quantize(made("qwen3"), tmp_path / "out", **changes))


def test_weights_without_codes_are_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    weight = "model.layers.0.self_attn.q_proj.weight"
    tensors = foreign.unfused(made("qwen3"))
    parts, _ = foreign.nf4(tensors.pop(weight).float())
    tensors |= {f"{weight.removesuffix('.weight')}.{leaf}": part for leaf, part in parts.items()}
    block = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "no integer codes" in refused_plan(foreign.write_like(made("qwen3"), tmp_path / "nf4", tensors, block))


def test_a_scale_past_fp16_stops_the_writing_and_leaves_nothing(made: Callable[..., Path], tmp_path: Path) -> None:
    model = open_model(str(made("qwen3", "Q4_0")))
    source = model.source
    assert isinstance(source, PackedSource)
    planned = gguf_write.plan(model.adapter, source, model.path, "baby")
    name = next(name for name in source.weights if ".experts.5." in name)
    spoilt = source.weights[name]

    def codes(parts: Any) -> Any:
        weight = spoilt.codes(parts)  # type: ignore[misc]
        weight.scales[0, 0] = 1e6
        return weight

    broken = type(spoilt)(spoilt.info, spoilt.width, spoilt.parts, spoilt.decode, scheme=spoilt.scheme, codes=codes)
    changed = PackedSource(source.folder, source.label, source.weights | {name: broken}, source.virtual)
    with pytest.raises(InputError, match=r"experts\.5.*fp16 cannot hold"):
        gguf_write.write(planned, model.adapter, changed, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []
