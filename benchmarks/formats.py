"""The embedded model in every format, each verified from its own files: `python benchmarks/formats.py [OUT]`.

Quantizes the embedded model once, by --recipe (default: rtn-int4), exports it to every format that can hold it, and
runs `verify` on each folder. Prints a table: bytes, KL, its distance from the KL of the compressed-tensors files, and
why a format could not hold the model. The evaluation has no pictures, because GGUF has no vision tower; all formats are
measured on the same rows. --group-size 32 is GGUF's group. --attention quantizes attention too, which shows what GPTQ's
layout does with q and k. --rows makes it short. Exits 1 when a format's KL is off by more than --allowed (relative).
Formats that hold other weights than the run's are excepted: NF4, and GPTQ's layout with --attention.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from onecard.checkpoint.files import make_folder
from onecard.checkpoint.formats.compressed_tensors_config import NAME
from onecard.conversion.export import export
from onecard.conversion.exporters import FORMATS
from onecard.core.errors import InputError
from onecard.core.rows import Unwatched
from onecard.eval.verify import VerifyOptions, verify
from onecard.models.known import demo_folder
from onecard.pipeline import Options, quantize
from onecard.recipe import load_recipe

# Rounding weights to bf16 or fp16 moves the mean by less; one wrong group of codes moves it by far more.
ALLOWED = 0.02


def texts_alone(out: Path) -> Path:
    """The embedded evaluation documents without pictures."""
    lines = (demo_folder() / "data" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(line for line in lines if "text" in json.loads(line)), encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", nargs="?", type=Path, help="a folder to keep the checkpoints in [default: a temporary one]"
    )
    parser.add_argument("--recipe", default="rtn-int4")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--rows", type=int, help="evaluation rows [default: the recipe's]")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--allowed", type=float, default=ALLOWED)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    changes: dict[str, object] = {"format": NAME, "tasks": (), "max_flip_rate": None}
    if arguments.group_size:
        changes["group_size"] = arguments.group_size
    if arguments.rows:
        changes["evaluation_rows"] = arguments.rows
    if arguments.attention:
        changes["quantize_roles"] = (*recipe.widths.quantize_roles, "attention")
    if arguments.asymmetric:
        changes["symmetric"] = False
    recipe = type(recipe).model_validate(recipe.model_dump() | changes)
    with tempfile.TemporaryDirectory(prefix="onecard-formats-") as temporary:
        home = arguments.out or Path(temporary)
        make_folder(home)
        source, texts = home / "quantized", texts_alone(home / "evaluation.jsonl")
        options = Options("cpu", overwrite=source.exists(), evaluation=texts)
        first = quantize("demo", source, recipe, options, quiet=True)
        reference, worst = first.kl["kl_mean_nats"], 0.0
        print("| format | bytes of weights | mean KL, nats | off |\n|---|---|---|---|")
        print(f"| {recipe.name}, as quantized | {first.plan['emitted_bytes']:,} | {reference:.6f} | |")
        for name in FORMATS:
            out = home / name
            try:
                done = export(str(source), name, out, Unwatched(), overwrite=out.exists())
            except InputError as error:
                print(f"| {name} | cannot hold it: {str(error).splitlines()[1].strip(' -')[:90]}... | | |")
                continue
            found = verify(
                "demo", str(out), recipe, device_name="cpu", quiet=True, options=VerifyOptions(evaluation=texts)
            ).kl["kl_mean_nats"]
            off = found / reference - 1
            block = json.loads((out / "config.json").read_text()).get("quantization_config", {})
            note = " (q, k and v in 16 bits)" if "kept_in_16_bits" in block.get("meta", {}) else ""
            note = " (quantized anew)" if name == "bnb-nf4" else note
            worst = worst if note else max(worst, abs(off))
            print(f"| {name} | {done.line()['weight_bytes']:,} | {found:.6f} | {off:+.2%}{note} |", flush=True)
    if worst > arguments.allowed:
        sys.exit(f"a format's KL is {worst:.2%} off, and {arguments.allowed:.2%} are allowed")


if __name__ == "__main__":
    main()
