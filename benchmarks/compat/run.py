"""auto-gptq and GPTQModel, each in its own environment, read what we write: `make compat`.

    python benchmarks/compat/run.py [--build build/compat]

1. The GPTQ layout. Random codes (4 and 8 bits; groups of 32, 64, 128 and rows; symmetric and not; positive and negative
   scales; versions 1 and 2), and every matrix of the embedded model, quantized by us and exported to that layout.
   auto-gptq's QuantLinear and GPTQModel's unpack them, and must give our codes (`gptq_reads.py`).
2. The quantizer. auto-gptq's `GPTQ` class is the reference: same weights, rows and settings. With its scales our codes
must
   be no worse, since it is the same algorithm; with our own scales the error must be no larger (`gptq_reference.py`).

Prints both tables for docs/formats.md and writes BUILD/compat.json. Exit code 1 if anything disagrees or is worse. The
environments are those of benchmarks/peers/environments.py.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from onecard.calibration.texts import prepare_texts
from onecard.checkpoint.formats import gptq_write
from onecard.checkpoint.loading import load_with_transformers
from onecard.checkpoint.model import open_model
from onecard.checkpoint.packed import PackedSource
from onecard.core.method import Method
from onecard.core.quantized_weight import QuantizedWeight
from onecard.core.scheme import BY_ROW, Scheme
from onecard.models.known import demo_folder
from onecard.quantize.gptq import gptq, prepare
from onecard.quantize.site import quantize_batch, relative_output_error
from onecard.recipe import load_recipe

HERE = Path(__file__).resolve().parent
TOOLS = {"autogptq": "auto-gptq", "gptqmodel": "GPTQModel"}
OUTPUTS, INPUTS = 96, 256
VERSIONS = {"gptq": 1, "gptq-v2": 2}
# Both add in fp32 and in other orders, and a value half-way between two codes may go either way: measured, at most
# 0.3 % of the error of one matrix.
SAME_SCALES = 1.01
CALIBRATION_ROWS = 24


def environment(build: Path, name: str, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    python = build / "env" / name / "bin" / "python"
    return subprocess.run([python, HERE / script, folder], stdout=subprocess.PIPE, text=True, check=False)


# 1. The layout


def case_of(weight: QuantizedWeight, version: int) -> dict[str, Any]:
    outputs, inputs = weight.codes.shape
    scheme = weight.scheme
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "version": version,
        "in_features": inputs,
        "out_features": outputs,
    }


def said(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """What a reader must find: unsigned codes, unsigned zero points, and the weight."""
    half = 1 << (weight.scheme.bits - 1)
    zeros = torch.zeros_like(weight.scales, dtype=torch.int8) if weight.zero_points is None else weight.zero_points
    return {
        "codes": weight.codes.to(torch.int16) + half,
        "zeros": zeros.to(torch.int16) + half,
        "dense": weight.dequantize(torch.float32),
    }


def random_weight(scheme: Scheme, seed: int) -> QuantizedWeight:
    """A weight with codes over their whole range, any zero points, and scales of both signs that are exact in fp16."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(scheme.code_min, scheme.code_max + 1, shape, generator=generator, dtype=torch.int8)

    groups = scheme.groups(INPUTS)
    size, sign = (torch.rand(OUTPUTS, groups, generator=generator) for _ in range(2))
    scales = ((0.001 + 0.05 * size) * torch.where(sign < 0.5, -1, 1)).to(torch.bfloat16)
    zeros = None if scheme.symmetric else codes(OUTPUTS, groups)
    return QuantizedWeight(codes(OUTPUTS, INPUTS), scales, zeros, scheme)


def random_cases() -> dict[str, tuple[QuantizedWeight, int]]:
    found = {}
    for bits in (4, 8):
        for group in (32, 64, 128, BY_ROW):
            for symmetric, versions in ((True, (1, 2)), (False, (2,))):
                scheme = Scheme(bits, group, symmetric)
                for version in versions:
                    found[f"{scheme}, version {version}"] = random_weight(scheme, len(found)), version
    return found


def write_random(folder: Path) -> None:
    cases, tensors = {}, {}
    for name, (weight, version) in random_cases().items():
        cases[name] = case_of(weight, version)
        stored = gptq_write.pack(weight, version) | said(weight)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items()}
    write_cases(folder, cases, tensors)


def write_cases(folder: Path, cases: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "cases.safetensors")


def write_exported(int4: Path, exported: Path, version: int, folder: Path) -> None:
    """Every matrix of an exported folder as a case: its parts from there, the expected reading from the int4 files."""
    source, cases, tensors = open_model(str(int4)).source, {}, {}
    assert isinstance(source, PackedSource)
    folder_of = open_model(str(exported)).folder
    for module in source.schemes:
        weight = source.quantized(f"{module}.weight")
        assert weight is not None, module
        cases[module] = case_of(weight, version)
        stored = {part: folder_of.get(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        tensors |= {f"{module}.{part}": tensor for part, tensor in (stored | said(weight)).items()}
    write_cases(folder, cases, tensors)


def onecard(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "onecard", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def write_layouts(build: Path) -> dict[str, Path]:
    """Write the folders for gptq_reads.py. Returns name -> folder."""
    work = build / "gptq"
    shutil.rmtree(work, ignore_errors=True)
    write_random(work / "random")
    onecard("quantize", "demo", work / "int4", "--recipe", "rtn-int4")
    found = {"random codes": work / "random"}
    for name, version in VERSIONS.items():
        onecard("export", work / "int4", "--format", name, "-o", work / name)
        write_exported(work / "int4", work / name, version, work / f"{name}-cases")
        found[f"embedded model, {name}"] = work / f"{name}-cases"
    return found


def read_layouts(build: Path) -> list[dict[str, Any]]:
    found = []
    for what, folder in write_layouts(build).items():
        for environment_name, tool in TOOLS.items():
            if tool == "auto-gptq" and what.endswith("gptq-v2"):
                continue  # it knows version 1 alone
            done = environment(build, environment_name, "gptq_reads.py", folder)
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            wrong = [f"{line['case']}: {', '.join(line['problems'])}" for line in lines if line["problems"]]
            if not lines or (done.returncode and not wrong):
                wrong.append(f"{tool} did not run: exit code {done.returncode}")
            version = lines[0]["version"] if lines else "?"
            found.append({"what": what, "tool": tool, "version": version, "matrices": len(lines), "wrong": wrong})
    return found


# 2. The reference


def correlated(seed: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and rows whose inputs are correlated and differ in size, as a network's do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs // 4, inputs, generator=generator) * torch.rand(inputs, generator=generator).pow(3)
    rows = torch.randn(4 * inputs, inputs // 4, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), rows + 0.1 * torch.randn(rows.shape, generator=generator)


def real_problems() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrices of the embedded model with their real inputs; experts have their own rows, already scaled."""
    model = open_model("demo")
    rows = prepare_texts(model, load_recipe("demo"), None, None, needs_calibration=True).calibration[:CALIBRATION_ROWS]
    network = load_with_transformers(demo_folder() / "model", torch.float32)
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    weights: dict[str, torch.Tensor] = {}

    def listen(name: str, module: Any, weight: torch.Tensor) -> None:
        weights[name] = weight.detach().clone()
        module.register_forward_pre_hook(lambda _, given: seen[name].append(given[0].detach().flatten(0, -2)))

    for block in (0, 2, 3):
        layer = network.language_model.model.layers[block]
        listen(f"block {block} o_proj", layer.self_attn.o_proj, layer.self_attn.o_proj.weight)
        shared = layer.feed_forward.shared_expert
        listen(f"block {block} shared gate", shared.gate_proj, shared.gate_proj.weight)
        listen(f"block {block} shared down", shared.down_proj, shared.down_proj.weight)
        experts = layer.feed_forward.experts
        listen(f"block {block} expert 5 gate and up", experts, experts.gate_up_proj[5].T)
    with torch.inference_mode():
        for row in rows:
            network(input_ids=row.tokens[None], pixel_values=row.pixels, use_cache=False)
    found = {}
    for name, parts in seen.items():
        if "expert 5" in name:  # every expert gets all rows; those of other experts are zeros
            parts = [part.unflatten(0, (experts.num_experts, -1))[5] for part in parts]
        joined = torch.cat(parts)
        found[name] = weights[name].float(), joined[joined.any(-1)]
    return found


def reference(build: Path) -> list[dict[str, Any]]:
    """One line for each problem and setting: their output error and ours."""
    folder = build / "reference"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    problems = {f"random {o} x {i}": correlated(n, o, i) for n, (o, i) in enumerate([(64, 128), (128, 256), (96, 512)])}
    problems |= real_problems()
    settings = [
        {"group_size": group, "damping": 0.01, "act_order": order, "static_groups": static}
        for group in (32, 128)
        for order, static in ((True, True), (False, True), (False, False))
    ]
    parts = {
        f"{n}.{part}": t.contiguous()
        for n, pair in problems.items()
        for part, t in zip(("weight", "rows"), pair, strict=True)
    }
    save_file(parts, folder / "problems.safetensors")
    (folder / "settings.json").write_text(json.dumps(settings))
    environment(build, "autogptq", "gptq_reference.py", folder).check_returncode()
    theirs = load_file(folder / "reference.safetensors")
    found = []
    for name, (weight, rows) in problems.items():
        w_BOI, moment_BII = weight[None], (rows.T @ rows / len(rows))[None]
        for number, setting in enumerate(settings):
            scheme = Scheme(4, setting["group_size"], True)
            prepared = prepare(moment_BII, setting["damping"], setting["act_order"])
            scales = theirs[f"{name}.{number}.scales"][None]
            made = {
                "theirs": theirs[f"{name}.{number}.weight"][None],
                "same scales": gptq(w_BOI, prepared, scales, None, scheme).weight().dequantize(),
            }
            for ours, rounds in (("own scales", 0), ("refined", 2)):
                method = Method(
                    damping=setting["damping"],
                    activation_order=setting["act_order"],
                    refine_rounds=rounds,
                    output_blocks=0,
                )
                made[ours] = quantize_batch(w_BOI, moment_BII, scheme, method, torch.float16).weight.dequantize()
            (base,) = relative_output_error(w_BOI, made.pop("theirs"), moment_BII)
            ratios = {key: relative_output_error(w_BOI, q, moment_BII)[0] / base for key, q in made.items()}
            found.append({"problem": name, "rows": len(rows)} | setting | {"their_error": base, "ratios": ratios})
    return found


def draw(layouts: list[dict[str, Any]], errors: list[dict[str, Any]]) -> int:
    """Print both tables. Returns the number of faults."""
    print("| what | reader | matrices | codes, zero points, weights, forward |\n|---|---|---|---|")
    for line in layouts:
        verdict = "agree" if not line["wrong"] else f"{len(line['wrong'])} differ"
        print(f"| {line['what']} | {line['tool']} {line['version']} | {line['matrices']} | {verdict} |")
    print(
        "\n| group, order, static groups | problems | our output error over auto-gptq's: same scales | own scales |"
        " refined |\n|---|---|---|---|---|"
    )
    groups: dict[tuple[int, bool, bool], list[dict[str, Any]]] = defaultdict(list)
    for line in errors:
        groups[line["group_size"], line["act_order"], line["static_groups"]].append(line)
    for (size, order, static), lines in groups.items():
        cells = []
        for key in ("same scales", "own scales", "refined"):
            ratios = [line["ratios"][key] for line in lines]
            cells.append(f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        print(f"| {size}, {order}, {static} | {len(lines)} | {' | '.join(cells)} |")
    wrong = [f"{line['what']}, {line['tool']}: {problem}" for line in layouts for problem in line["wrong"]]
    for line in errors:
        for key, bar in (("same scales", SAME_SCALES), ("own scales", 1.0), ("refined", 1.0)):
            if not line["ratios"][key] <= bar:
                where = f"group {line['group_size']}, order {line['act_order']}, static {line['static_groups']}"
                wrong.append(f"{line['problem']}, {where}, {key}: {line['ratios'][key]:.4f} of auto-gptq's error")
    for problem in wrong:
        print(problem, file=sys.stderr)
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE.parent.parent / "build" / "compat")
    parser.add_argument("--only", choices=("layouts", "reference"))
    given = parser.parse_args()
    build = given.build.resolve()
    layouts = read_layouts(build) if given.only != "reference" else []
    errors = reference(build) if given.only != "layouts" else []
    (build / "compat.json").write_text(json.dumps({"layouts": layouts, "reference": errors}, indent=1))
    return int(bool(draw(layouts, errors)))


if __name__ == "__main__":
    sys.exit(main())
