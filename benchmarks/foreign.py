"""Other tools' checkpoints of the embedded model, judged by `onecard verify` and a second time without it.

    make peers-env                                 # the environments llmcompressor and bitsandbytes are needed
    python benchmarks/foreign.py                   # all calibration rows; llm-compressor takes most of the time
    python benchmarks/foreign.py --rows 64         # a trial: some minutes on an idle machine
    python benchmarks/foreign.py --only NAME       # one of the names below; may be repeated

Three folders are made the way users make them:

- llmcompressor-gptq    llm-compressor's GPTQ W4A16, group 128, as it saves it (compressed-tensors);
- transformers-nf4      transformers with BitsAndBytesConfig(nf4, double quantization) and save_pretrained. It quantizes
                        Linear modules alone (the vision tower's too), so Llama 4's fused experts stay bf16;
- slices-nf4            bitsandbytes' quantize_4bit on every text matrix, each expert's slice included, stored the way
                        bitsandbytes serialises it, with a config.json that says so.

Each folder is judged by a user's command, `onecard verify demo FOLDER --recipe demo`, and then independently: the
tool's own package dequantizes, transformers runs both whole models on the same rows, and the KL is computed in fp64.
Prints a table for docs/benchmarks.md and writes BUILD/foreign.json. Exit code 1 if the two KLs differ by more than
MOST_DIFFERENCE of the figure.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, Llama4ForConditionalGeneration
from transformers.utils import logging

from onecard.calibration.texts import prepare_texts
from onecard.checkpoint.loading import load_with_transformers
from onecard.checkpoint.model import open_model
from onecard.core.rows import Row
from onecard.models.known import demo_folder
from onecard.models.llama4 import Llama4Adapter
from onecard.recipe import load_recipe

HERE = Path(__file__).resolve().parent
SOURCE = demo_folder() / "model"
RECIPE = "demo"
# The two sides add in fp32 in different orders; measured: 1e-7.
MOST_DIFFERENCE = 1e-4
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


# transformers' names of the modules that the comparison leaves unquantized.
KEPT = ["vision_model", "multi_modal_projector", "router", "lm_head"]


def peer(name: str, group: int, given: argparse.Namespace) -> Path:
    """A job of the comparison with other tools; its checkpoint, as the tool saved it."""
    rows = ["--rows", str(given.rows)] if given.rows else []
    which = ["--peer", name, "--model", "demo", "--group", group, "--choice", *rows]
    command = [sys.executable, HERE / "peers" / "run.py", *which, "--build", given.build]
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
    return Path(given.build / ("trial" if given.rows else "jobs") / "demo" / f"{name}-g{group}" / "checkpoint")


def tokenizer_to(folder: Path) -> None:
    """The tokenizer files that a tool did not save because it was given weights alone."""
    for path in SOURCE.iterdir():
        if path.suffix in (".json", ".jinja") and not (folder / path.name).exists():
            shutil.copy(path, folder)


def make_llmcompressor(given: argparse.Namespace) -> Path:
    return peer("llmcompressor-gptq", 128, given)


def load_nf4() -> Any:
    """The source as transformers quantizes it while loading."""
    config = BitsAndBytesConfig(**NF4)
    return Llama4ForConditionalGeneration.from_pretrained(
        SOURCE, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )


def make_transformers(given: argparse.Namespace) -> Path:
    folder = Path(given.build / "foreign" / "transformers-nf4")
    shutil.rmtree(folder, ignore_errors=True)
    load_nf4().save_pretrained(folder)
    tokenizer_to(folder)
    return folder


def make_slices(given: argparse.Namespace) -> Path:
    folder = Path(given.build / "foreign" / "slices-nf4")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(peer("bitsandbytes-nf4", 64, given), folder)
    config = json.loads((SOURCE / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": KEPT} | NF4
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer_to(folder)
    return folder


def dequantized(model: Any) -> Any:
    """transformers' four-bit model, dequantized by transformers, then in fp32.

    Parameters alone are cast: RoPE's buffers are fp32 already.
    """
    model = model.dequantize().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


def read_transformers(_: Path) -> Any:
    """The model as it was before it was saved. transformers 5.23 cannot load the folder again: it wants quantized
    experts one by one, and saved them fused."""
    return dequantized(load_nf4())


def read_slices(folder: Path) -> Any:
    """The folder loaded by transformers, which finds every expert where it expects it."""
    return dequantized(
        Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    )


# Name -> how the folder is made, and how the tool's own package and transformers read it.
FIELD: dict[str, tuple[Callable[[argparse.Namespace], Path], Callable[[Path], Any]]] = {
    "llmcompressor-gptq": (make_llmcompressor, lambda folder: load_with_transformers(folder, torch.float32)),
    "transformers-nf4": (make_transformers, read_transformers),
    "slices-nf4": (make_slices, read_slices),
}


def command_line(*arguments: str) -> dict[str, Any]:
    """The JSON line of a command."""
    done = subprocess.run(
        [sys.executable, "-m", "onecard", *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return dict(json.loads(done))


def log_probabilities(model: Any, row: Row, placeholder: int) -> torch.Tensor:
    """fp64 [predicted tokens, V], without predictions of image placeholders."""
    with torch.inference_mode():
        logits = model(input_ids=row.tokens[None], pixel_values=row.pixels, use_cache=False).logits[0, :-1]
    return logits[row.tokens[1:] != placeholder].double().log_softmax(-1)


def whole_model_kl(model: Any, rows: list[Row], wanted: list[torch.Tensor], placeholder: int) -> float:
    """Mean KL a token, in nats."""
    total = tokens = 0.0
    for row, p in zip(rows, wanted, strict=True):
        total += float((p.exp() * (p - log_probabilities(model, row, placeholder))).sum())
        tokens += len(p)
    return total / tokens


def quantized_share(facts: dict[str, Any]) -> tuple[float, float]:
    """The shares stored in fewer than 16 bits: of all parameters, and of the routed experts'."""
    counts = {
        role: [entry["parameters"], sum(n for w, n in entry["widths"].items() if w not in ("BF16", "F16", "F32"))]
        for role, entry in facts["roles"].items()
    }
    total, low = (sum(column) for column in zip(*counts.values(), strict=True))
    return low / total, counts["expert"][1] / counts["expert"][0]


def draw(found: list[dict[str, Any]]) -> None:
    """The table for docs/benchmarks.md."""
    columns = (
        "checkpoint",
        "bytes",
        "bits per weight",
        "quantized (of the experts)",
        "mean KL (95 %)",
        "p99",
        "same top-1",
        "mean KL, whole in transformers",
        "apart",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for f in found:
        interval = f"{f['kl_mean_nats']:.5f} ({f['kl_low_nats']:.5f} to {f['kl_high_nats']:.5f})"
        print(
            f"| {f['name']} | {f['emitted_bytes']:,} | {f['bits_per_weight']:.2f} | {f['quantized_share']:.1%} "
            f"({f['experts_share']:.0%}) | {interval} | {f['kl_p99_nats']:.3f} | {f['same_top1']:.2%} | "
            f"{f['whole_model_kl_mean_nats']:.5f} | {f['difference']:.1e} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(FIELD))
    parser.add_argument("--rows", type=int, help="calibrate on this many rows, the first ones")
    parser.add_argument("--build", type=Path, default=HERE.parent / "build" / "peers")
    given = parser.parse_args()
    given.build = given.build.resolve()
    logging.set_verbosity_error()
    model = open_model("demo")
    assert isinstance(model.adapter, Llama4Adapter)
    rows = prepare_texts(model, load_recipe(RECIPE), None, None, needs_calibration=False).evaluation
    placeholder = int(model.adapter.config.image_token_index)
    original = load_with_transformers(SOURCE, torch.float32)
    wanted = [log_probabilities(original, row, placeholder) for row in rows]
    found = []
    for name in given.only or FIELD:
        make, read = FIELD[name]
        folder = make(given)
        facts = command_line("inspect", str(folder))
        line = command_line("verify", "demo", str(folder), "--recipe", RECIPE)
        theirs = whole_model_kl(read(folder), rows, wanted, placeholder)
        share, experts = quantized_share(facts)
        found.append(
            line
            | {
                "name": name,
                "format": facts["format"],
                "quantized_share": share,
                "experts_share": experts,
                "calibration_rows": given.rows,
                "whole_model_kl_mean_nats": theirs,
                "difference": abs(line["kl_mean_nats"] / theirs - 1),
            }
        )
        (given.build / "foreign.json").write_text(json.dumps(found, indent=1))
    draw(found)
    return int(any(not f["difference"] <= MOST_DIFFERENCE for f in found))


if __name__ == "__main__":
    sys.exit(main())
