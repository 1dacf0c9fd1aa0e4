"""The command line as a stranger meets it: help, exit codes, one JSON line, exact plans, inspection, verification."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from babies import make_baby
from onecard import cli, forecast
from onecard.blocks import quantize as stages
from onecard.checkpoint import inspect
from onecard.checkpoint.model import open_model
from onecard.checkpoint.source import Folder, open_folder
from onecard.checkpoint.stored_widths import stored_widths
from onecard.core import errors
from onecard.models.families import load_adapter
from onecard.quantize.site import SiteResult
from onecard.recipe import load_recipe, recipe_names

Check = Callable[..., str]
FAMILIES = ["scout", "maverick", "llama4-text", "qwen3"]
VERBS = [
    "quantize",
    "verify",
    "flips",
    "gate",
    "baseline",
    "report",
    "check",
    "card",
    "publish",
    "plan",
    "inspect",
    "generate",
    "recipes",
    "calibration",
    "export",
    "pareto",
]
RECIPES = [
    "demo",
    "demo-fit",
    "llama4-scout-2x48gb",
    "llama4-scout-h100",
    "llama4-scout-h100-fit",
    "llama4-scout-h100-int4-attention",
    "llama4-scout-h200",
    "nf4",
    "qwen3-30b-a3b-24gb",
    "rtn-int4",
]
PROMISED = {
    "out",
    "emitted_bytes",
    "bits_per_weight",
    "kl_mean_nats",
    "kl_p99_nats",
    "same_top1",
    "tokens",
    "seconds",
    "peak_rss_bytes",
}


def strict(text: str) -> Any:
    """JSON as other programs read it: NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def one_line(result: Result) -> dict[str, Any]:
    """The one JSON line on stdout of a command that ended well."""
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert result.stdout.count("\n") == 1
    assert result.stdout.endswith("}\n")
    return dict(strict(result.stdout))


# --- help and exit codes


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_worked_example(onecard: Callable[..., Result], verb: str) -> None:
    """The example is one that the command line itself accepts."""
    shown = onecard(verb, "--help").stdout
    assert onecard(verb, "-h").stdout == shown
    lines = shown.partition("Example")[2].replace("\\\n", " ").splitlines()
    example = next(line for line in lines if line.strip().startswith("onecard "))
    words = shlex.split(example.partition(">")[0])
    assert words[:2] == ["onecard", verb]
    context = cli.main.commands[verb].make_context(verb, words[2:])
    assert context.params


def test_main_help(onecard: Callable[..., Result]) -> None:
    shown = onecard("--help")
    assert shown.exit_code == 0
    assert all(f"\n  {verb} " in shown.stdout for verb in VERBS)
    assert set(cli.main.commands) == set(VERBS)
    assert "onecard quantize demo" in shown.stdout
    assert onecard("--version").stdout.startswith("onecard, version ")


def test_exit_codes_are_documented() -> None:
    documented = (cli.__doc__ or "").partition("Exit codes:")[2]
    for error, word in ((errors.LimitError, "limit"), (errors.InputError, "input"), (errors.ResourceError, "disk")):
        (part,) = [part for part in documented.split(";") if part.split()[0] == str(error.exit_code)]
        assert word in part
    assert "130 " in documented
    assert [e.exit_code for e in (errors.LimitError, errors.InputError, errors.ResourceError)] == [1, 2, 4]


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["quantize"],
        ["quantize", "a", "b"],
        ["plan", "a", "--wat"],
        ["generate", "a", "b", "--max-new-tokens", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2(onecard: Callable[..., Result], arguments: list[str]) -> None:
    result = onecard(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert result.stdout == ""


def test_a_bug_of_ours_keeps_its_traceback(onecard: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(inspect, "inspect", broken)
    assert isinstance(onecard("inspect", "demo").exception, ZeroDivisionError)


def test_help_is_quick() -> None:
    """torch takes seconds to import: only a verb that computes may."""
    code = "import sys, onecard.cli; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- recipes


def test_recipes_lists_all_that_ship(onecard: Callable[..., Result]) -> None:
    shown = onecard("recipes").stdout
    assert recipe_names() == RECIPES
    for name in RECIPES:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert name in shown.splitlines()
        assert recipe.description in shown


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_prints_one_that_loads_again(onecard: Callable[..., Result], tmp_path: Path, name: str) -> None:
    result = onecard("recipes", name)
    assert result.exit_code == 0
    (tmp_path / "mine.yaml").write_text(result.stdout)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe(name)


def test_what_the_shipped_recipes_promise() -> None:
    recipes = {name: load_recipe(name) for name in RECIPES}
    said = {name: (r.bits, r.group_size, r.symmetric) for name, r in recipes.items()}
    others = {"demo-fit": "fit", "llama4-scout-h100-fit": "fit", "llama4-scout-h200": 8}
    assert said.pop("nf4") == (4, 64, True)
    assert said == {name: (others.get(name, 4), 128, True) for name in said}
    for name, recipe in recipes.items():
        assert (recipe.card.gpu is not None) == name.startswith("llama4-scout"), name
        assert recipe.card.context == (131_072 if recipe.card.gpu else 32_768), name
    assert set(recipes["llama4-scout-h100"].quantize_roles) == {"expert", "shared_expert"}
    assert set(recipes["llama4-scout-h100-int4-attention"].quantize_roles) == {"expert", "shared_expert", "attention"}
    assert set(recipes["qwen3-30b-a3b-24gb"].quantize_roles) == {"expert", "mlp", "attention"}
    # q and k need a vLLM that permutes their scales: facts.md.
    assert "35033" in (recipes["llama4-scout-h100-int4-attention"].note or "")
    assert recipes["rtn-int4"].family is None
    assert (recipes["rtn-int4"].method, recipes["llama4-scout-h100"].method) == ("rtn", "best")


# --- plan


def test_plan_shows_the_note_of_a_recipe(
    onecard: Callable[..., Result], baby: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    result = onecard("plan", baby("llama4-text"), "--recipe", recipe(note="needs the newest engine"))
    assert one_line(result)["recipe"] == "test"
    assert "needs the newest engine" in result.stderr


PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "attention": {"quantize_roles": ["expert", "shared_expert", "mlp", "attention"], "max_shard_bytes": 20_000},
    "int8 asymmetric": {"bits": 8, "symmetric": False},
    "int4 asymmetric": {"symmetric": False, "group_size": 16},
    "kept": {"keep_modules": ["*.layers.0.*"]},
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "default") for family in FAMILIES),
        *(("qwen3", kind) for kind in PLANS if kind != "default"),
        ("scout", "attention"),
        *((family, kind) for family in ("deepseek", "mixtral") for kind in ("default", "attention")),
    ],
)
def test_plan_is_exact_before_a_weight_is_read(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    kind: str,
) -> None:
    """Invariant 3: bytes of every file and tensor, as os.stat and the safetensors library see them afterwards."""
    use, out = recipe(method="rtn", **PLANS[kind]), tmp_path / "out"

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was read")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "get", never)
        promised = one_line(onecard("plan", baby(family), "--recipe", use))
        listed = onecard("plan", baby(family), "--recipe", use, "--tensors").stderr
        plan = forecast.plan(str(baby(family)), load_recipe(str(use))).plan
    line = one_line(onecard("quantize", baby(family), out, "--recipe", use, *texts))
    sizes = {path.name: os.stat(path).st_size for path in out.glob("*.safetensors")}
    assert {shard.file: shard.file_bytes for shard in plan.shards} == sizes
    assert promised["emitted_bytes"] == line["emitted_bytes"] == sum(sizes.values())
    assert promised["shards"] == len(sizes)
    stored = {}
    for name in sizes:
        with safe_open(out / name, framework="pt") as file:
            stored |= {key: (name, file.get_tensor(key).nbytes) for key in file.keys()}  # noqa: SIM118
    assert {tensor.name: (shard.file, tensor.nbytes) for shard, tensor in plan.tensors()} == stored
    assert sum(promised["role_bytes"].values()) == sum(nbytes for _, nbytes in stored.values())
    found = stored_widths(open_model(str(out)))
    assert {(w.role, w.width): w for w in found} == {(w.role, w.width): w for w in plan.widths}
    assert promised["widths"] == [asdict(width) for width in plan.widths]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {tensor: file for tensor, (file, _) in stored.items()}
    assert index["metadata"]["total_size"] == sum(nbytes for _, nbytes in stored.values())
    parameters = sum(torch.Size(shape).numel() for shape in load_adapter(baby(family)).expected().values())
    assert promised["parameters"] == parameters
    assert line["bits_per_weight"] == promised["bits_per_weight"] == sum(sizes.values()) * 8 / parameters
    squeezed = "".join(listed.split())
    assert all(tensor.split(".")[-1] in squeezed for tensor in stored)
    check_kept_tensors(baby(family), out)


def check_kept_tensors(source: Path, out: Path) -> None:
    """Invariant 5: what is not quantized is byte-identical, in dtype too; the stored experts of Llama 4 are split. What
    the record says was aimed at the reference stream has its dtype and shape, and is not far from what it was."""
    before = {k: v for path in source.glob("*.safetensors") for k, v in load_file(path).items()}
    after = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
    kept = {name for name in before if name in after}
    roles = load_adapter(source).role
    must = {name for name in before if roles(name).value in ("router", "norm", "embedding", "head", "vision")}
    assert must <= kept
    blocks = json.loads((out / "onecard.json").read_text())["blocks"]
    aimed = {f"{module}.weight" for block in blocks for module in block["aimed"]}
    assert {roles(name).value for name in aimed} <= {"router", "attention"}
    for name in kept:
        assert before[name].dtype == after[name].dtype
        if name in aimed:
            gone = (before[name].float() - after[name].float()).norm() / before[name].float().norm()
            assert 0 < gone < 0.5, (name, float(gone))
            continue
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_plan_of_a_tied_head(
    onecard: Callable[..., Result],
    copied: Callable[..., Path],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """With tied embeddings no head is stored, before or after, and the walk still finds one."""
    model = copied("qwen3")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    use = recipe(method="rtn")
    promised = one_line(onecard("plan", model, "--recipe", use))
    line = one_line(onecard("quantize", model, tmp_path / "out", "--recipe", use, *texts))
    sizes = [os.stat(path).st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert promised["emitted_bytes"] == line["emitted_bytes"] == sum(sizes)
    assert "lm_head.weight" not in open_folder(tmp_path / "out").names


# --- inspect


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_an_original(onecard: Callable[..., Result], baby: Callable[..., Path], family: str) -> None:
    result = onecard("inspect", baby(family))
    facts = one_line(result)
    size = os.stat(baby(family) / "model.safetensors").st_size
    tensors = load_file(baby(family) / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    llama = family != "qwen3"
    expected = {
        "family": "llama4" if llama else "qwen3_moe",
        "blocks": 2,
        "experts": 8,
        "experts_per_token": 1 if llama else 2,
        "moe_blocks": {"maverick": 1, "qwen3": 1}.get(family, 2),
        "hidden_size": 64,
        "vocab_size": 256,
        "vision": family in ("scout", "maverick"),
        "quantized": False,
        "parameters": parameters,
        "file_bytes": size,
        "shards": 1,
        "bits_per_weight": size * 8 / parameters,
        "config_faults": [],
    }
    assert {key: facts[key] for key in expected} == expected
    assert sum(role["parameters"] for role in facts["roles"].values()) == parameters
    assert {width for role in facts["roles"].values() for width in role["widths"]} == {"BF16"}
    assert f"{parameters:,}" in result.stderr


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_inspect_a_quantized_checkpoint(
    onecard: Callable[..., Result], baby: Callable[..., Path], emitted: Callable[..., tuple[Path, Result]], family: str
) -> None:
    """Invariant 2 as a user sees it: every expert in int4, nothing else."""
    out, _ = emitted(family)
    before, facts = one_line(onecard("inspect", baby(family))), one_line(onecard("inspect", out))
    assert facts["quantized"]
    assert facts["parameters"] == before["parameters"]
    assert facts["file_bytes"] == sum(os.stat(path).st_size for path in out.glob("*.safetensors"))
    low = {"expert", "shared_expert", "mlp"}
    for role, entry in facts["roles"].items():
        assert entry["widths"] == {"int4 group 32" if role in low else "BF16": before["roles"][role]["parameters"]}


# --- published faults of config.json

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "rope scaling": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        "factor 16",
    ),
    "rope parameters": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
        "factor 16",
    ),
    "eps": ({"rms_norm_eps": 1e-6}, "1e-05"),
    "layers": ({"num_hidden_layers": 80}, "48"),
    "hidden size": ({"hidden_size": 8192}, "5120"),
    "heads": ({"num_attention_heads": 64}, "40"),
    "active experts": ({"num_experts_per_tok": 2}, "1"),
}


@pytest.mark.parametrize("nested", [False, True], ids=["text", "multimodal"])
@pytest.mark.parametrize("kind", FAULTS)
def test_published_faults_are_known(baby: Callable[..., Path], kind: str, nested: bool) -> None:
    """Raw config.json with one fault, top level or under text_config; what it should be is said."""
    adapter = load_adapter(baby("scout" if nested else "llama4-text"))
    sound = {
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": 48,
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "rope_scaling": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
    }
    change, true = FAULTS[kind]
    faulty = {k: v for k, v in sound.items() if k != "rope_scaling" or "rope_parameters" not in change} | change
    assert adapter.faults({"text_config": sound} if nested else sound) == []
    (found,) = adapter.faults({"text_config": faulty} if nested else faulty)
    key = next(iter(change))
    assert key in found or "rope" in found
    assert true in found


def test_every_fault_is_told_at_once(baby: Callable[..., Path]) -> None:
    changes: dict[str, Any] = {}
    for kind, (change, _) in FAULTS.items():
        changes |= change if kind != "rope parameters" else {}
    assert len(load_adapter(baby("llama4-text")).faults(changes)) == len(FAULTS) - 1


def test_qwen_has_no_faults_of_llama(baby: Callable[..., Path]) -> None:
    """Qwen3's eps is 1e-6, and rightly so."""
    assert load_adapter(baby("qwen3")).faults({"rms_norm_eps": 1e-6, "num_hidden_layers": 80}) == []


def test_inspect_plan_and_quantize_warn_of_faults(
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """A fault is warned of and not mended: the user's file is what is walked."""
    model = copied("scout")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-6
    config["text_config"]["rope_parameters"] |= {"factor": 8.0, "high_freq_factor": 4.0}
    (model / "config.json").write_text(json.dumps(config))
    inspected = onecard("inspect", model)
    faults = one_line(inspected)["config_faults"]
    assert len(faults) == 2
    use = recipe(method="rtn")
    planned = onecard("plan", model, "--recipe", use)
    made = onecard("quantize", model, tmp_path / "out", "--recipe", use, *texts)
    for result in (inspected, planned, made):
        assert result.exit_code == 0
        assert "rms_norm_eps is 1e-06" in result.stderr
        assert "high_freq_factor 4" in result.stderr
    *told, few = json.loads((tmp_path / "out" / "onecard.json").read_text())["warnings"]
    assert told == faults
    assert few.startswith("6 evaluation documents")


# --- quantize and verify


def test_quantize_says_one_line_to_scripts_and_a_card_to_people(emitted: Callable[..., tuple[Path, Result]]) -> None:
    out, result = emitted("scout")
    line = one_line(result)
    assert line.keys() >= PROMISED
    assert line["out"] == str(out)
    assert 0 < line["kl_mean_nats"] <= line["kl_p99_nats"]
    assert line["kl_low_nats"] <= line["kl_mean_nats"] <= line["kl_high_nats"]
    assert 0 <= line["same_top1"] <= 1
    assert line["tokens"] == 6 * 23  # six rows of 24 tokens: the first of each is not predicted
    assert line["seconds"] > 0
    assert line["peak_rss_bytes"] > 50e6
    for word in ("KL(bf16", "95 %", "same top-1", "bits per weight", "slowest stage", "RAM peak", str(line["tokens"])):
        assert word in result.stderr
    assert not out.with_name("scout.work").exists()


def test_what_is_emitted(emitted: Callable[..., tuple[Path, Result]], baby: Callable[..., Path]) -> None:
    """Side files are carried along unchanged, no file is left half-written, and the record is strict JSON."""
    out, result = emitted("scout")
    source = baby("scout")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    names = {path.name for path in out.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    carried = {path.name for path in source.iterdir()} - {"model.safetensors"}
    assert names == shards | carried | {"model.safetensors.index.json", "onecard.json", "SHA256SUMS"}
    record, line = strict((out / "onecard.json").read_text()), one_line(result)
    assert record["schema_version"] == 2
    assert record["kl"]["kl_mean_nats"] == line["kl_mean_nats"]
    assert record["plan"]["emitted_bytes"] == line["emitted_bytes"]
    assert [len(block["expert_rows"]) for block in record["blocks"]] == [8, 8]
    # Every row of every calibration token goes to one expert of each layer (top-1).
    assert {sum(block["expert_rows"]) for block in record["blocks"]} == {record["texts"]["calibration"]["tokens"]}
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    block = config.pop("quantization_config")
    assert config == before
    assert (block["quant_method"], block["format"]) == ("compressed-tensors", "pack-quantized")
    assert (block["quantization_status"], next(iter(block["config_groups"].values()))["targets"]) == (
        "compressed",
        ["Linear"],
    )


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_verify_proves_what_quantize_said(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    family: str,
) -> None:
    """The same rows through the files as reloaded: the same figures."""
    out, made = emitted(family)
    said = one_line(made)
    line = one_line(onecard("verify", baby(family), out, "--recipe", recipe(), *texts[2:]))
    assert line.keys() >= PROMISED
    assert line["out"] == str(out)
    for key in ("emitted_bytes", "bits_per_weight", "tokens", "same_top1"):
        assert line[key] == said[key]
    for key in ("kl_mean_nats", "kl_p99_nats", "kl_low_nats", "kl_high_nats"):
        assert line[key] == pytest.approx(said[key], rel=1e-6)


def test_verify_of_a_model_against_itself(
    baby: Callable[..., Path], onecard: Callable[..., Result], texts: list[str]
) -> None:
    line = one_line(onecard("verify", baby("scout"), baby("scout"), *texts[2:]))
    assert (line["kl_mean_nats"], line["kl_p99_nats"], line["same_top1"]) == (0, 0, 1)


def test_verify_sees_two_swapped_experts(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """Its figure is of the files: with two experts' codes exchanged it is another, and a far worse one."""
    out, made = emitted("scout")
    spoilt = Path(shutil.copytree(out, tmp_path / "spoilt"))
    stem = "language_model.model.layers.0.feed_forward.experts."
    record = json.loads((out / "onecard.json").read_text())
    rows = record["blocks"][0]["expert_rows"]
    a, b = sorted(range(8), key=rows.__getitem__)[-2:]
    for path in spoilt.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.startswith(f"{stem}{a}.")]:
            other = name.replace(f"{stem}{a}.", f"{stem}{b}.")
            tensors[name], tensors[other] = tensors[other], tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
    line = one_line(onecard("verify", baby("scout"), spoilt, *texts[2:]))
    assert line["kl_mean_nats"] > 5 * one_line(made)["kl_mean_nats"]


def test_one_document_has_no_interval_and_still_is_json(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """An interval over one document does not exist: null, not NaN, in the line and in the record."""
    arguments = ["--evaluation", jsonl("one.jsonl", [{"text": "the only one that there is"}])]
    line = one_line(onecard("quantize", baby("qwen3"), tmp_path / "out", "--recipe", recipe(method="rtn"), *arguments))
    assert line["kl_mean_nats"] > 0
    assert line["kl_high_nats"] is None
    strict((tmp_path / "out" / "onecard.json").read_text())


def test_verify_wants_nothing_of_the_recipe_but_its_texts(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
) -> None:
    """Without --recipe the user's texts are read to the default length: whole documents here."""
    line = one_line(onecard("verify", baby("qwen3"), emitted("qwen3")[0], *texts[2:]))
    assert line["tokens"] > 6 * 23


def test_names_that_look_like_markup(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """The card is drawn with rich, which takes [/x] for markup and cuts long words: a folder may be called so."""
    model = Path(shutil.copytree(baby("qwen3"), tmp_path / "we[" / "ird]" / ("long" * 30) / "model[bold]"))
    use, out = recipe(method="rtn", name="[/mine]"), tmp_path / "out[" / "]"
    for arguments in (
        ["inspect", model],
        ["plan", model, "--recipe", use, "--tensors"],
        ["quantize", model, out, "--recipe", use, *texts],
        ["verify", model, out, *texts[2:]],
    ):
        result = onecard(*arguments)
        one_line(result)
        # A card folds long paths, between its borders.
        assert "model[bold]" in "".join(result.stderr.replace("│", "").split())


# --- limits of the recipe


def test_too_few_rows_for_an_expert(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    refused: Check,
    texts: list[str],
    tmp_path: Path,
) -> None:
    """Exit code 1, the block and every starved expert by name, and the work is kept."""
    use = recipe(fail_below_expert_rows=1_000_000)
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", "--recipe", use, *texts)
    refused(result, "block 0", *(f"expert {e}" for e in range(8)), "1000000", "calibration", code=1)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "state.json").exists()


def test_a_warning_of_few_rows_is_in_the_record(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
) -> None:
    use = recipe(warn_below_expert_rows=1_000_000)
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", "--recipe", use, *texts)
    record = json.loads((tmp_path / "out" / "onecard.json").read_text())
    assert any("8 of 8 experts got fewer than 1000000" in warning for warning in record["warnings"])
    assert "8 of 8 experts" in result.stderr
    assert record["fallbacks"]["experts_starved"] == 8


@pytest.mark.parametrize("allowed", [0, 1000])
def test_fallbacks_are_counted_and_limited(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    refused: Check,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allowed: int,
) -> None:
    """Invariant 8: every matrix that fell back is counted; past the recipe's limit the run fails."""
    real, called = stages.quantize_batch, [0]

    def falling(*args: Any, **kwargs: Any) -> SiteResult:
        result = real(*args, **kwargs)
        called[0] += 1
        return replace(result, diagonal_fallbacks=3)

    monkeypatch.setattr(stages, "quantize_batch", falling)
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", "--recipe", recipe(max_fallbacks=allowed), *texts)
    if allowed == 0:
        refused(result, f"{3 * called[0]} matrices", "allows 0", code=1)
        assert not (tmp_path / "out").exists()
    else:
        assert result.exit_code == 0
        record = json.loads((tmp_path / "out" / "onecard.json").read_text())
        assert record["fallbacks"]["diagonal_fallbacks"] == 3 * called[0] > 0


# --- generate, and the whole in a process of its own


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_generate(
    onecard: Callable[..., Result], emitted: Callable[..., tuple[Path, Result]], baby: Callable[..., Path], family: str
) -> None:
    """transformers loads what was emitted and answers in as many tokens as it may."""
    for checkpoint in (emitted(family)[0], baby(family)):
        result = onecard("generate", checkpoint, "who are you?", "--max-new-tokens", "5")
        assert result.exit_code == 0, result.output + repr(result.exception)
        assert result.stdout.endswith("\n")
        assert len(result.stdout) <= 6


def test_quantize_in_a_process_of_its_own(
    tmp_path: Path, baby: Callable[..., Path], recipe: Callable[..., Path], texts: list[str]
) -> None:
    """`python -m onecard`: one line on stdout, and on stderr nothing that other libraries have to say."""
    command = [
        sys.executable,
        "-m",
        "onecard",
        "quantize",
        str(baby("scout")),
        str(tmp_path / "out"),
        "--recipe",
        str(recipe(method="rtn")),
        *texts,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert strict(done.stdout).keys() >= PROMISED
    ours = [line for line in done.stderr.splitlines() if line.startswith(("onecard quantize", "│", "╭", "╰"))]
    assert done.stderr.split() == "\n".join(ours).split()


def test_a_baby_of_other_seed_is_another_source(tmp_path: Path, baby: Callable[..., Path]) -> None:
    """The digest samples the weights: one structure with other weights, or of another size, is another source."""
    same = make_baby(tmp_path / "same", "qwen3", 2)
    other = make_baby(tmp_path / "other", "qwen3", 2, seed=5)
    longer = make_baby(tmp_path / "longer", "qwen3", 3)
    digests = [open_folder(folder).digest for folder in (baby("qwen3"), same, other, longer)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
