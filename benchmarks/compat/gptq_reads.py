"""Does a tool's own QuantLinear read our GPTQ layout? Runs in that tool's environment: `gptq_reads.py FOLDER`.

FOLDER holds `cases.json` (name -> bits, group_size, sym, version, in_features, out_features) and `cases.safetensors`.
For each case the latter has the four stored tensors (`NAME.qweight`, ...) and our own reading of them: `NAME.codes` and
`NAME.zeros` (unsigned) and `NAME.dense` [out, in], fp32. None of our code runs here; it only wrote that folder.

auto-gptq 0.7.1 has `qlinear_cuda_old.QuantLinear`, which knows version 1 alone. GPTQModel 7.7 has `TorchLinear`, with
its own conversion of version 1. Codes and zero points that they unpack must equal ours. Their weight must equal ours,
exactly where they multiply in fp32 and within fp16 where they multiply in fp16. Their forward must be a product with
it. Prints one JSON line a case. Exit code 1 if any case is wrong.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

PARTS = ("qweight", "qzeros", "scales", "g_idx")
ROWS = 16
# Code times scale in fp16 differs from fp32 by half a step of fp16; the difference of codes is exact.
FP16 = 2.0**-10


def fields(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Unsigned fields of int32 words along an axis, by plain arithmetic on Python's integers."""
    per_word = 32 // bits
    wide = words.to(torch.int64) & 0xFFFFFFFF
    parts = [torch.div(wide, 2 ** (bits * j), rounding_mode="floor") % 2**bits for j in range(per_word)]
    return torch.stack(parts, axis + 1).flatten(axis, axis + 1)


def auto_gptq(case: dict[str, Any], stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any, float]:
    """Returns (weight [out, in], forward, tolerance)."""
    from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear

    layer = QuantLinear(case["bits"], case["group_size"], case["in_features"], case["out_features"], bias=False)
    known = dict(layer.named_buffers())
    for name in PARTS:
        assert known[name].shape == stored[name].shape, (name, known[name].shape, stored[name].shape)
        assert known[name].dtype == stored[name].dtype, (name, known[name].dtype, stored[name].dtype)
    missing = layer.load_state_dict(stored, strict=False)
    assert not missing.missing_keys, missing
    assert not missing.unexpected_keys, missing
    layer.scales = layer.scales.float()
    return layer(torch.eye(case["in_features"])).T, layer, 0.0


def gptqmodel(case: dict[str, Any], stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any, float]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    layer = TorchLinear(
        bits=case["bits"],
        group_size=case["group_size"],
        sym=case["sym"],
        desc_act=False,
        in_features=case["in_features"],
        out_features=case["out_features"],
        bias=False,
        format=FORMAT.GPTQ if case["version"] == 1 else FORMAT.GPTQ_V2,
    )
    for name in PARTS:
        assert getattr(layer, name).shape == stored[name].shape, (name, getattr(layer, name).shape)
    missing = layer.load_state_dict(stored, strict=False)
    assert not missing.unexpected_keys, missing
    if case["version"] == 1:
        convert_gptq_v1_to_v2_format_module(layer, bits=case["bits"], pack_dtype=torch.int32)
    layer.eval()
    layer.optimized = True  # else it compiles each case
    layer.post_init()
    return layer.dequantize_weight().T.float(), lambda x: layer(x.half()).float(), FP16


def main() -> int:
    folder = Path(sys.argv[1])
    cases, tensors = json.loads((folder / "cases.json").read_text()), load_file(folder / "cases.safetensors")
    torch.cuda.synchronize = lambda *args: None  # auto-gptq calls it on any machine
    try:
        import gptqmodel as tool

        read, name = gptqmodel, "GPTQModel"
    except ImportError:
        import auto_gptq as tool

        read, name = auto_gptq, "auto-gptq"
    wrong = 0
    for key, case in cases.items():
        stored = {part: tensors[f"{key}.{part}"] for part in PARTS}
        wanted, codes, zeros = (tensors[f"{key}.{what}"] for what in ("dense", "codes", "zeros"))
        if name == "auto-gptq" and case["version"] == 2:
            continue
        problems = []
        if not torch.equal(fields(stored["qweight"], case["bits"], 0).T, codes.to(torch.int64)):
            problems.append("codes")
        shift = 1 if case["version"] == 1 else 0
        if not torch.equal(fields(stored["qzeros"], case["bits"], 1).T + shift, zeros.to(torch.int64)):
            problems.append("zero points")
        try:
            weight, forward, slack = read(case, stored)
            apart = float(((weight - wanted).abs() - slack * wanted.abs()).max())
            if apart > 0:
                problems.append(f"weights, by up to {float((weight - wanted).abs().max()):.3g}")
            x = torch.randn(ROWS, case["in_features"], generator=torch.Generator().manual_seed(0))
            off = float((forward(x) - x @ wanted.T).norm() / (x @ wanted.T).norm())
            if off > max(slack, 1e-5):
                problems.append(f"forward, by {off:.2g} of its size")
        except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
            problems.append(f"{type(error).__name__}: {error}")
        wrong += bool(problems)
        print(json.dumps({"tool": name, "version": tool.__version__, "case": key, "problems": problems}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
