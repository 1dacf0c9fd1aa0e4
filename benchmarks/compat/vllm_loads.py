"""vLLM takes our files, and answers from them: `make compat-vllm` (five minutes on two shared cores).

    python benchmarks/compat/vllm_loads.py                  # every case; build/compat/vllm must be there
    python benchmarks/compat/vllm_loads.py --only int4      # the cases whose name contains this

For each case the embedded model (and build/peers/models/qwen3-moe, if `make peers` has trained it) is quantized by
round-to-nearest. Then two things are checked:

- The loader (with_vllm.py load). vLLM's own model class and load_weights get every tensor of the files. Every element
  of every parameter must be written exactly once, and every tensor must be used. The parameters are cut apart
  under the names of the files, and vLLM's permutation of q and k is undone. They must equal the stored tensors bit for
  bit, and compressed-tensors' own unpacking must give our codes.
- The engine (with_vllm.py serve). The bf16 export (of Llama 4 its text model, dense.py) is served: greedy tokens of 8
  prompts must be transformers' on the same files, both in fp32.

Prints a table and every exception to it, and writes BUILD/vllm.json. Exit code 1 when anything is wrong.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from dense import exported, onecard, run, text_model
from safetensors.torch import load_file
from vllm_environment import BUILD, interpreter

from onecard.calibration.documents import Document
from onecard.calibration.tokens import Encoder
from onecard.checkpoint.formats import compressed_tensors_read as ct_read
from onecard.checkpoint.formats import compressed_tensors_write as ct
from onecard.checkpoint.model import Model, open_model
from onecard.checkpoint.soundness import PARTS, stored_modules
from onecard.models.adapter import Role
from onecard.models.known import demo_folder

HERE = Path(__file__).resolve().parent
QWEN = Path("peers") / "models" / "qwen3-moe"  # beside BUILD
TEXT = ["expert", "shared_expert", "mlp", "attention"]
RECIPE: dict[str, Any] = {"method": "rtn", "evaluation_rows": 2, "evaluation_row_tokens": 64}
# vLLM stacks the rows of these into one parameter, in this order.
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
# vLLM's own parameters for a quantized key-value cache; other files hold none of them.
PLACEHOLDERS = tuple(f".attn.{head}_{part}" for head in "qkv" for part in ("scale", "zero_point"))
COLUMNS = (
    "case",
    "class",
    "tensors of the files, all used",
    "parameters, each element written once",
    "int matrices",
    "codes equal",
    "greedy tokens as transformers'",
)
# 48 + 64 tokens stay within the embedded model's attention chunk of 128; one prompt goes past it.
PROMPTS, PROMPT_TOKENS, LONG_TOKENS, NEW_TOKENS = 7, 48, 160, 64


@dataclass(frozen=True)
class Case:
    """`recipe`: changes to RECIPE. `packed`: serve the int4 files themselves, with vLLM's kernel for int4 experts on
    CPUs with AMX. The kernel wants symmetric weights, groups longer than 32, and a family that weighs experts'
    outputs."""

    name: str
    model: str
    recipe: dict[str, Any] = field(default_factory=dict)
    packed: bool = False


CASES = (
    Case("int4-g128, attention bf16", "demo", {"group_size": 128, "quantize_roles": TEXT[:3]}),
    Case("int4-g32, attention too", "demo", {"group_size": 32, "quantize_roles": TEXT}),
    Case("int8-g64, attention too", "demo", {"bits": 8, "group_size": 64, "quantize_roles": TEXT}),
    Case(
        "int4-g32 asymmetric, attention bf16",
        "demo",
        {"group_size": 32, "symmetric": False, "quantize_roles": TEXT[:3]},
    ),
    Case("int4 by row, attention too", "demo", {"group_size": -1, "quantize_roles": TEXT}),
    Case(
        "int4-g32; int8-g64 shared experts, int8 attention by row, layer 2's experts int8-g32",
        "demo",
        {
            "group_size": 32,
            "quantize_roles": TEXT,
            "schemes": {
                "shared_expert": "int8 group 64",
                "attention": "int8 by row",
                "*layers.2.*experts.*": "int8 group 32",
            },
        },
    ),
    Case("qwen3-moe int4-g32, attention too", "qwen3-moe", {"group_size": 32, "quantize_roles": TEXT}),
    Case("qwen3-moe int4-g64, attention too", "qwen3-moe", {"group_size": 64, "quantize_roles": TEXT}, packed=True),
)


def quantize(case: Case, source: str, work: Path) -> Path:
    out, recipe = work / "int", work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "loads", "description": case.name, **RECIPE, **case.recipe}))
    onecard("quantize", source, out, "--recipe", recipe, "--overwrite")
    return out


# --- the loaded parameters under the names of the files


def pieces(
    loaded: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter cut into (name in the files, tensor).

    A fused parameter's weight_shape is left out: each of its shards writes it in turn, and vLLM never reads it."""
    for name, parameter in loaded.items():
        if name.endswith(PLACEHOLDERS):
            continue
        module, _, leaf = name.rpartition(".")
        head, _, last = module.rpartition(".")
        if last == "routed_experts":
            which, _, part = leaf.partition("_")
            if part == "weight_shape":
                continue
            for expert, value in enumerate(parameter):
                names = [f"{head}.{expert}.{projection}.{part}" for projection in EXPERTS[which]]
                yield from zip(names, value.chunk(len(names)), strict=True)
        elif last in STACKED:
            if leaf != ct.SHAPE:
                names = [f"{head}.{projection}.{leaf}" for projection in STACKED[last]]
                yield from zip(names, parameter.split([len(stored[n]) for n in names]), strict=True)
        else:
            yield name, parameter


def unpermuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo vLLM's order of a head's rows: the file's even rows first, then the odd."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def rotated(model: Model, name: str) -> int:
    """The number of heads of a q or k of Llama 4's text blocks, whose rows vLLM permutes; 0 for anything else."""
    adapter, config = model.adapter, model.adapter.text_config
    if adapter.family != "llama4" or adapter.role(name) is not Role.ATTENTION:
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return int(heads.get(name.rsplit(".", 2)[-2], 0))


def compare(model: Model, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns facts of the loaded parameters, and what is wrong."""
    facts = json.loads((out / "loaded.json").read_text())
    stored = {name: model.folder.get(name) for name in model.folder.names}
    problems = [
        f"{name} was written {least} to {most} times"
        for name, (least, most) in facts["writes"].items()
        if (least, most) != (1, 1) and not name.endswith((*PLACEHOLDERS, "weight_shape"))
    ]
    seen = {}
    for name, piece in pieces(load_file(out / "loaded.safetensors"), stored):
        heads = rotated(model, name)
        seen[name] = unpermuted(piece, heads) if heads else piece
    left = sorted(n for n in stored.keys() - seen.keys() if not n.endswith(ct.SHAPE))
    problems += [f"{name} of the files is in no parameter" for name in left]
    problems += [f"{name} is no tensor of the files" for name in sorted(seen.keys() - stored.keys())]
    same = [
        name for name in sorted(seen.keys() & stored.keys()) if torch.equal(seen[name].to(stored[name]), stored[name])
    ]
    problems += [f"{name} is not what the file holds" for name in sorted((seen.keys() & stored.keys()) - {*same})]
    schemes = stored_modules(model.folder, model.adapter.expected())[0].schemes
    for module, scheme in schemes.items():
        parts = {part: stored[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in stored}
        ours = ct_read.unpack(parts, scheme)
        theirs = unpack_from_int32(seen[f"{module}.{ct.PACKED}"], scheme.bits, torch.Size(ours.codes.shape))
        if not torch.equal(theirs, ours.codes):
            problems.append(f"{module} has other codes")
    facts |= {
        "tensors": len(stored),
        "pieces": len(same),
        "matrices": len(schemes),
        "codes": sum(torch.Size(model.adapter.expected()[f"{m}.weight"]).numel() for m in schemes),
        "unwritten": sorted(n for n, (least, _) in facts.pop("writes").items() if not least),
    }
    return facts, problems


# --- served


def prompts(model: Model) -> list[list[int]]:
    """Held-out texts of the embedded model, cut to PROMPT_TOKENS; the last one is longer."""
    encoder, rows = Encoder(model.path, model.adapter), []
    for line in (demo_folder() / "data" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if isinstance(row.get("text"), str):
            rows.append(encoder.encode(Document(row["id"], "prompt", row["text"], None)).tokens.tolist())
    enough = [ids for ids in rows if len(ids) >= LONG_TOKENS]
    return [*(ids[:PROMPT_TOKENS] for ids in enough[:PROMPTS]), enough[PROMPTS][:LONG_TOKENS]]


def answers(folder: Path, rows: list[list[int]]) -> list[list[int]]:
    """transformers' greedy tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    found = []
    for row in rows:
        with torch.inference_mode():
            ids = model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=NEW_TOKENS)
        found.append(ids[0, len(row) :].tolist())
    return found


def served(folder: Path, work: Path, python: Path, dtype: str) -> list[list[int]]:
    out = work / f"served-{folder.name}-{dtype}"
    run(
        python,
        HERE / "with_vllm.py",
        "serve",
        folder,
        out,
        "--prompts",
        work / "prompts.json",
        "--tokens",
        NEW_TOKENS,
        "--dtype",
        dtype,
        ours=False,
    )
    return list(json.loads((out / "served.json").read_text()))


def agreed(one: list[list[int]], other: list[list[int]]) -> list[int]:
    """For each prompt the number of tokens before the first that differs."""
    return [
        next((at for at, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), NEW_TOKENS)
        for x, y in zip(one, other, strict=True)
    ]


def serve(model: Model, original: Model, work: Path, python: Path, packed: bool) -> tuple[dict[str, Any], list[str]]:
    folder, rows = text_model(exported(model.path, work / "export"), work / "bf16"), prompts(original)
    (work / "prompts.json").write_text(json.dumps(rows))
    theirs, ours = served(folder, work, python, "float32"), answers(folder, rows)
    same = agreed(theirs, ours)
    problems = [
        f"prompt {n}: transformers goes another way after {at} tokens" for n, at in enumerate(same) if at < NEW_TOKENS
    ]
    text = Encoder(original.path, original.adapter).tokenizer.decode(theirs[0])
    facts = {"prompts": len(rows), "new_tokens": NEW_TOKENS, "same_tokens": same, "first_text": text}
    if packed and amx():
        # vLLM's int4 kernels compute in bf16, so texts differ somewhere. Texts of the bf16 weights show how soon.
        facts["packed_same_tokens"] = agreed(served(model.path, work, python, "bfloat16"), ours)
        facts["bf16_same_tokens"] = agreed(served(folder, work, python, "bfloat16"), ours)
        begun = [n for n, at in enumerate(facts["packed_same_tokens"]) if not at]
        problems += [f"prompt {n}: the int4 files begin otherwise" for n in begun]
    return facts, problems


def amx() -> bool:
    return "amx_tile" in Path("/proc/cpuinfo").read_text()


def judged(case: Case, source: str, build: Path) -> dict[str, Any]:
    work = build / "vllm-cases" / "".join(c if c.isalnum() else "-" for c in case.name)
    shutil.rmtree(work, ignore_errors=True)
    (work / "out").mkdir(parents=True)
    folder, python = quantize(case, source, work), interpreter(build)
    model, original = open_model(str(folder)), open_model(source)
    run(python, HERE / "with_vllm.py", "load", folder, work / "out", ours=False)
    facts, problems = compare(model, work / "out")
    answered, more = serve(model, original, work, python, case.packed)
    return {"case": case.name, **facts, **answered, "problems": problems + more}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--build", type=Path, default=BUILD)
    given = parser.parse_args()
    build, found = given.build.resolve(), []
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"{datetime.now(UTC):%Y-%m-%d}, transformers {transformers.__version__} as the twin")
    for case in CASES:
        if given.only not in case.name:
            continue
        source = "demo" if case.model == "demo" else str(build.parent / QWEN)
        if source != "demo" and not Path(source).exists():
            print(f"{case.name}: not run, {QWEN} is not there (`make peers` trains it)")
            continue
        row = judged(case, source, build)
        found.append(row)
        if len(found) == 1:
            print(f"vLLM {row['vllm']}, torch {row['torch']}\n")
            print(f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
        written = row["parameters"] - len(row["unwritten"])
        same = f"{sum(row['same_tokens'])} of {row['prompts'] * NEW_TOKENS}"
        cells = [case.name, row["class"], row["tensors"], written, row["matrices"], f"{row['codes']:,}", same]
        amiss = f" {len(row['problems'])} AMISS" if row["problems"] else ""
        print(f"| {' | '.join(map(str, cells))} |{amiss}", flush=True)
        if "packed_same_tokens" in row:
            told = f"{row['packed_same_tokens']} tokens as transformers' in fp32 before another"
            print(f"\nthe int4 files themselves, served in bf16: {told}; their bf16 export: {row['bf16_same_tokens']}")
        for problem in row["problems"][:10]:
            print(f"    {problem}")
    (build / "vllm.json").write_text(json.dumps(found, indent=1))
    return int(not found or any(row["problems"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
