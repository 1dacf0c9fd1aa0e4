"""Exports hold the codes that they were made from, in exactly the planned bytes, and read back as the same model.

What a format cannot hold is refused before a byte is written.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from command_line import listing, run_onecard
from inputs import write_recipe
from onecard.checkpoint import files
from onecard.checkpoint.formats import compressed_tensors_config as ct_config
from onecard.checkpoint.loading import load_with_transformers
from onecard.checkpoint.model import Model, open_model
from onecard.checkpoint.packed import PackedSource
from onecard.checkpoint.source import open_folder
from onecard.conversion import conversion, exporters, to_gptq
from onecard.core.quantized_weight import QuantizedWeight

# Maverick has blocks with experts and blocks without; Scout is the same with experts in all.
FAMILIES = ("maverick", "llama4-text", "qwen3")
# Families that publish experts one by one, under their own names.
MORE = ("deepseek", "mixtral")
Made = Callable[..., Path]
Run = Callable[..., Result]


@pytest.fixture(scope="session")
def packed(baby: Callable[..., Path], texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(family, recipe's changes) -> a baby quantized by round-to-nearest, attention too. DeepSeek's attention stays:
    one of its matrices has 40 rows, and GPTQ's layout needs multiples of 32."""
    made: dict[str, Path] = {}

    def get(family: str, **changes: object) -> Path:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in made:
            home = tmp_path_factory.mktemp("packed")
            roles = ["expert", "shared_expert", "mlp", *(["attention"] if family != "deepseek" else [])]
            recipe = write_recipe(home / "recipe.yaml", **{"method": "rtn", "quantize_roles": roles} | changes)
            done = run_onecard("quantize", baby(family), home / "out", "--recipe", recipe, *texts[2:])
            assert done.exit_code == 0, done.stderr
            made[key] = home / "out"
        return made[key]

    return get


MIXED = {"schemes": {"attention": "int8 by row", "mlp": "int8 group 32 asymmetric"}}


def all_codes(model: Model) -> dict[str, tuple[torch.Tensor, ...]]:
    """Module -> codes, scales and zero points, for every module stored as codes."""
    found = {}
    for module in conversion.coded(model):
        weight = conversion.codes(model, module)
        zero = torch.zeros_like(weight.scales, dtype=torch.int8) if weight.zero_points is None else weight.zero_points
        found[module] = (weight.codes, weight.scales.float(), zero)
    return found


# NF4 holds no codes: test_bitsandbytes.py. llama.cpp's file holds neither these babies' tokenizer nor Qwen3's dense
# layer: test_gguf.py has others.
@pytest.mark.parametrize("form", sorted(exporters.FORMATS.keys() - {"gguf", "bnb-nf4"}))
@pytest.mark.parametrize(
    ("family", "symmetric"), [*((f, True) for f in FAMILIES + MORE), ("maverick", False), ("qwen3", False)]
)
def test_every_file_has_the_bytes_that_were_planned_and_holds_the_same_codes(
    family: str, form: str, symmetric: bool, packed: Made, onecard: Run, tmp_path: Path
) -> None:
    source, out = packed(family, symmetric=symmetric), tmp_path / "out"
    planned = onecard("export", source, "--format", form, "-o", out, "--dry-run")
    if form == "gptq" and not symmetric:
        assert planned.exit_code == 2
        assert "gptq-v2" in planned.stderr
        return
    assert planned.exit_code == 0, planned.stderr
    assert not out.exists()
    done = onecard("export", source, "--format", form, "-o", out)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["files"] == json.loads(planned.stdout)["files"]
    assert told["files"] == {name: (out / name).stat().st_size for name in told["files"]}
    weights = {path.name for path in out.iterdir() if path.suffix == ".safetensors"}
    assert weights == {name for name in told["files"] if name.endswith(".safetensors")}
    assert onecard("check", out).exit_code == 0
    made, parent = open_model(str(out)), open_model(str(source))
    if form == "bf16":
        assert not made.quantized
        return
    codes, wanted = all_codes(made), all_codes(parent)
    left = wanted.keys() - codes.keys()
    permuted = {module for module in wanted if re.search(r"self_attn\.[qkv]_proj", module)}
    assert left == (permuted if form.startswith("gptq") and family in ("maverick", "llama4-text") else set())
    for module, parts in codes.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, wanted[module], strict=True)), module


@pytest.mark.parametrize("family", FAMILIES + MORE)
def test_bf16_has_the_sources_own_names_and_transformers_reads_the_same_model(
    family: str, packed: Made, baby: Callable[..., Path], onecard: Run, tmp_path: Path
) -> None:
    source, out = packed(family, symmetric=True), tmp_path / "out"
    assert onecard("export", source, "--format", "bf16", "-o", out).exit_code == 0
    original, written = open_folder(baby(family)), open_folder(out)
    assert written.infos == original.infos
    model, parent = open_model(str(out)), open_model(str(source))
    for name in parent.adapter.expected():
        assert torch.equal(conversion.dense(model, name), conversion.dense(parent, name, torch.bfloat16)), name
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config == json.loads((baby(family) / "config.json").read_text())
    tokens = torch.randint(4, 99, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, untouched, theirs = (
            load_with_transformers(folder, torch.float32)(input_ids=tokens).logits
            for folder in (out, baby(family), source)
        )
    assert not torch.allclose(ours, untouched, atol=1e-3), "the test sees weights that are not quantized"
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES + MORE)
def test_an_original_comes_back_from_bf16_bit_for_bit(
    family: str, baby: Callable[..., Path], onecard: Run, tmp_path: Path
) -> None:
    assert onecard("export", baby(family), "--format", "bf16", "-o", tmp_path / "out").exit_code == 0
    original, written = open_folder(baby(family)), open_folder(tmp_path / "out")
    assert {*written.names} == {*original.names}
    for name in original.names:
        assert written.infos[name] == original.infos[name]
        assert torch.equal(written.get(name).view(torch.uint8), original.get(name).view(torch.uint8)), name


@pytest.mark.parametrize("family", ["scout", "qwen3"])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq-v2", "bf16"])
def test_mixed_widths_go_through_every_format(
    form: str, family: str, packed: Made, baby: Callable[..., Path], onecard: Run, texts: list[str], tmp_path: Path
) -> None:
    """Two exports in a row keep the first codes, and so the KL."""
    source, out, back = packed(family, **MIXED), tmp_path / "out", tmp_path / "back"
    done = onecard("export", source, "--format", form, "-o", out)
    assert done.exit_code == 0, done.stderr
    lines = [json.loads(onecard("verify", baby(family), folder, *texts[2:]).stdout) for folder in (source, out)]
    assert lines[0]["kl_mean_nats"] > 1e-4
    # GPTQ's scales are fp16, so its weights are read in fp16: another rounding of the same products.
    assert (lines[1]["kl_mean_nats"] == lines[0]["kl_mean_nats"]) == (form != "gptq-v2")
    if form == "bf16":
        model, parent = open_model(str(out)), open_model(str(source))
        for name in parent.adapter.expected():
            assert torch.equal(conversion.dense(model, name), conversion.dense(parent, name, torch.bfloat16)), name
        return
    assert onecard("export", out, "--format", "compressed-tensors", "-o", back).exit_code == 0
    first, last = all_codes(open_model(str(source))), all_codes(open_model(str(back)))
    assert first.keys() >= last.keys()
    assert all(torch.equal(a, b) for module in last for a, b in zip(first[module], last[module], strict=True))
    blocks = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (source, back)]
    schemes = [set(ct_config.read_schemes(block).values()) for block in blocks]
    assert schemes[0] == schemes[1]
    assert len(schemes[0]) == {"scout": 2, "qwen3": 3}[family]


def test_q_and_k_of_llama4_stay_in_16_bits_in_gptqs_layout_and_the_config_says_why(
    packed: Made, onecard: Run, tmp_path: Path
) -> None:
    source = packed("scout", symmetric=True)
    assert onecard("export", source, "--format", "gptq", "-o", tmp_path / "out").exit_code == 0
    names = open_folder(tmp_path / "out").names
    stem = "language_model.model.layers.0.self_attn."
    for leaf in "qkv":  # v is fused with them
        assert f"{stem}{leaf}_proj.weight" in names
        assert f"{stem}{leaf}_proj.qweight" not in names
    assert f"{stem}o_proj.qweight" in names
    block = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert block == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    kept = block["meta"]["kept_in_16_bits"]
    assert "RoPE" in kept["why"]
    assert any(re.match(rule, f"{stem}q_proj") for rule in kept["modules"])
    model, parent = open_model(str(tmp_path / "out")), open_model(str(source))
    name = f"{stem}q_proj.weight"
    assert torch.equal(conversion.dense(model, name), conversion.dense(parent, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_of_dynamic_mean_what_is_stored_and_nothing_else(family: str, packed: Made, tmp_path: Path) -> None:
    """vLLM finds them by the names of fused modules, too."""
    model = open_model(str(packed(family, **MIXED)))
    block = to_gptq.block(model, 2)
    schemes, _ = to_gptq.split_schemes(model)
    units = conversion.units(model.adapter)

    def said(name: str) -> object:
        for rule, fields in block["dynamic"].items():
            if re.match(rule[2:], name):
                return fields if rule.startswith("+:") else None
        return {key: block[key] for key in ("bits", "group_size", "sym")}

    kept = conversion.kept_linears(model.adapter, schemes)
    for module in (*schemes, *kept):
        scheme = schemes.get(module)
        wanted = scheme and {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
        for name in {module, units.get(module, module)}:
            for prefix in ("", "model."):
                assert said(prefix + name) == wanted, name
    assert len(block["dynamic"]) < 25


def test_nothing_is_written_for_what_a_format_cannot_hold(
    packed: Made, baby: Callable[..., Path], onecard: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    refused(onecard("export", baby("scout"), "--format", "gptq", "-o", tmp_path / "a"), "quantize it first")
    refused(onecard("export", packed("scout"), "--format", "gguff", "-o", tmp_path / "a"), "gguff", "bf16")
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = listing(tmp_path)
    for more in ([], ["--overwrite"]):
        refused(
            onecard("export", packed("scout"), "--format", "bf16", "-o", tmp_path / "mine", *more), "no run of onecard"
        )
    refused(onecard("export", packed("scout"), "--format", "bf16", "-o", packed("scout") / "x"), "nested")
    assert listing(tmp_path) == before


def test_scales_that_fp16_cannot_hold_are_refused_and_nothing_stays(
    packed: Made, onecard: Run, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PackedSource.quantized

    def spoiled(self: PackedSource, name: str) -> object:
        weight = original(self, name)
        assert weight is not None
        if "layers.1." in name:
            weight.scales[0, 0] = 1e-9
        return weight

    monkeypatch.setattr(PackedSource, "quantized", spoiled)
    refused(onecard("export", packed("qwen3"), "--format", "gptq", "-o", tmp_path / "out"), "fp16", "e-10", "layers.1.")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_export_is_no_checkpoint_and_a_second_one_ends_in_the_same_bytes(
    packed: Made, onecard: Run, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = packed("maverick"), tmp_path / "out"
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 100_000)
    whole = tmp_path / "whole"
    assert onecard("export", source, "--format", "gptq", "-o", whole).exit_code == 0
    shards = sorted(whole.glob("*.safetensors"))
    assert len(shards) > 3
    last = next(name.removesuffix(".qweight") for name in load_file(shards[2]) if name.endswith(".qweight"))
    codes = conversion.codes

    def stops(model: Model, module: str) -> QuantizedWeight:
        if module == last:
            raise KeyboardInterrupt
        return codes(model, module)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "codes", stops)
        assert onecard("export", source, "--format", "gptq", "-o", out).exit_code == 130
    assert len(list(out.glob("*.safetensors"))) == 2
    assert not (out / "config.json").exists()
    refused(onecard("inspect", out), "config.json")
    refused(onecard("export", source, "--format", "gptq", "-o", out), "--overwrite")
    assert onecard("export", source, "--format", "gptq", "-o", out, "--overwrite").exit_code == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_the_record_says_what_it_was_made_from_and_check_holds_the_folder_against_it(
    packed: Made, onecard: Run, tmp_path: Path
) -> None:
    source, out = packed("qwen3"), tmp_path / "out"
    assert onecard("export", source, "--format", "gptq", "-o", out).exit_code == 0
    record, parent = (json.loads((f / "onecard.json").read_text()) for f in (out, source))
    assert record["export"]["from"]["digest"] == open_folder(source).digest
    assert record["export"]["format"] == "gptq"
    assert record["kl"] == parent["kl"]
    assert record["plan"]["emitted_bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert onecard("card", out).exit_code == 0
    assert onecard("check", out).exit_code == 0
    record["export"]["matrices"]["int8 group 32"] = 7
    (out / "onecard.json").write_text(json.dumps(record))
    result = onecard("check", out)
    assert result.exit_code == 1
    assert "0 matrices are stored as int8 group 32" in result.stderr


@pytest.mark.parametrize("form", ["gptq", "gptq-v2", "bf16"])
@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_a_recipes_format_is_that_of_an_export_of_the_same_codes(
    family: str, form: str, packed: Made, baby: Callable[..., Path], onecard: Run, texts: list[str], tmp_path: Path
) -> None:
    changes = {"method": "rtn", "quantize_roles": ["expert", "shared_expert", "mlp", "attention"], "format": form}
    recipe, out, exported = write_recipe(tmp_path / "recipe.yaml", **changes), tmp_path / "out", tmp_path / "exported"
    plan = onecard("plan", baby(family), "--recipe", recipe)
    assert plan.exit_code == 0, plan.stderr
    done = onecard("quantize", baby(family), out, "--recipe", recipe, *texts[2:])
    assert done.exit_code == 0, done.stderr
    assert onecard("export", packed(family), "--format", form, "-o", exported).exit_code == 0
    planned = json.loads(plan.stdout)
    assert planned["files"] == {name: (out / name).stat().st_size for name in planned["files"]}
    assert planned["emitted_bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    same = {"onecard.json", "SHA256SUMS"}  # the papers say how each was made
    contents = [{p.name: p.read_bytes() for p in f.iterdir() if p.name not in same} for f in (out, exported)]
    assert contents[0] == contents[1]
    assert not (tmp_path / "out.work").exists()
    checked = onecard("check", out)
    assert checked.exit_code == 0, checked.stderr
    assert json.loads(checked.stdout)["not_checked"] == []
    verified = json.loads(onecard("verify", baby(family), out, *texts[2:], "--recipe", recipe).stdout)
    assert verified["kl_mean_nats"] == json.loads(done.stdout)["kl_mean_nats"]


def test_a_recipe_whose_format_cannot_hold_its_schemes_is_refused_before_any_work(
    baby: Callable[..., Path], onecard: Run, refused: Callable[..., str], texts: list[str], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", method="rtn", symmetric=False, format="gptq")
    before = listing(tmp_path)
    for verb in (["plan", baby("qwen3")], ["quantize", baby("qwen3"), tmp_path / "out", *texts[2:]]):
        refused(onecard(*verb, "--recipe", recipe), "gptq-v2", "asymmetric")
    assert listing(tmp_path) == before


def test_a_run_that_is_killed_while_it_writes_its_format_ends_in_the_same_bytes(
    baby: Callable[..., Path], onecard: Run, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", method="rtn", format="gptq")
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 60_000)
    command = ("quantize", baby("qwen3"), tmp_path / "whole", "--recipe", recipe, *texts[2:])
    assert onecard(*command).exit_code == 0
    put, written = files.write_tensors, []

    def stops(path: Path, *args: object) -> None:
        if path.parent == tmp_path / "out":
            written.append(path.name)
            if len(written) == 3:
                raise KeyboardInterrupt
        put(path, *args)  # type: ignore[arg-type]

    command = ("quantize", baby("qwen3"), tmp_path / "out", "--recipe", recipe, *texts[2:])
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_tensors", stops)
        assert onecard(*command).exit_code == 130
    assert not (tmp_path / "out" / "config.json").exists()
    assert onecard(*command, "--resume").exit_code == 0

    def contents(name: str) -> dict[str, bytes]:
        papers = ("onecard.json", "SHA256SUMS")  # times are in them
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.name not in papers}

    assert contents("out") == contents("whole")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
