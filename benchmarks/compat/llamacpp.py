"""llama.cpp and our own walk on the same GGUF files: logits, and greedy text beside transformers'.

    python benchmarks/compat/llamacpp.py                        # the embedded model
    python benchmarks/compat/llamacpp.py --model build/peers/models/qwen3-moe
    python benchmarks/compat/llamacpp.py --checkpoint FOLDER    # a quantized version of --model, group 32, 64 or 128

llama.cpp is built from the llama-cpp-python source package (benchmarks/peers/environments.py, ten minutes the first
time, under --peers), and our small program llama_ask.cpp against it. Four files are written: the original as it is, the
quantized checkpoint with its codes (Q4_0), and both in F32, the quantized one dequantized. llama.cpp and our walk read
each, on held-out rows no longer than the context in which llama.cpp computes the model (its chunk is fixed).

llama.cpp rounds activations to the type that a weight's kernel wants: to 8-bit blocks (Q8_0) for Q4_0 and Q8_0, to bf16
for BF16, not at all for F32. So each file is walked twice, exactly and with activations rounded the same way by the
gguf package. In F32 nothing is rounded, and llama.cpp and our walk must agree. For the other files the second walk
shows how much of the difference is this rounding. (Not to the last bit: another order of sums now and then falls on the
other side of a step.)

Then texts (greedy.py): each engine's beside transformers' from the same codes. transformers reads the checkpoint
itself; compressed-tensors dequantizes it and rounds each weight to bf16. llama.cpp answers from the Q4_0 file, from the
codes in F32 (not rounded to bf16), and from an F32 file of the bf16 export. That last file holds the very weights that
transformers multiplies, so its text must be the same. vLLM answers from the bf16 export where `make compat-vllm` has
built it.

Exit code 1 when a mean KL exceeds MOST_KL, an F32 file's KL exceeds MOST_EXACT_KL, less than LEAST_EXPLAINED of a KL is
explained, a text from the same weights differs, or a text from rounded activations leaves transformers' where the two
best logits are further apart than MOST_MARGIN.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import greedy
import numpy as np
import torch
import yaml
from dense import exported, onecard, text_model
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import nn
from transformers.utils import logging
from vllm_environment import BUILD, interpreter

from onecard.calibration.texts import prepare_texts
from onecard.checkpoint.gguf import write as gguf_write
from onecard.checkpoint.model import Model, open_model
from onecard.core.device import Compute
from onecard.core.rows import Row
from onecard.models import gguf as words
from onecard.models.adapter import Adapter
from onecard.models.experts import RoutedExperts
from onecard.models.walk import Embedder, Walk
from onecard.recipe import load_recipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "peers"))
from environments import LLAMA, llama_cpp  # noqa: E402 - the peers' script is in a folder of its own

PACKAGES = ("gguf", "transformers", "compressed-tensors", "torch")
# The bf16 export holds the weights that transformers multiplies. Who answers from it.
SAME, VLLM = "bf16 export, F32", "vLLM, bf16 export"
CPU = torch.device("cpu")
# Bounds for llama.cpp against our walk. Where nothing is rounded, another order of sums leaves 1e-9.
MOST_KL, MOST_EXACT_KL = 1e-3, 1e-6
# Rounding activations in the walk removes at least this share of the mean KL (measured: 88 to 93 %).
LEAST_EXPLAINED = 0.5
# The largest margin of two best logits that rounding of activations may swap.
MOST_MARGIN = 0.5
ROW_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 127, 24, 64
RECIPE = {
    "name": "llamacpp",
    "description": "Group 32 for Q4_0.",
    "method": "rtn",
    "bits": 4,
    "group_size": 32,
    "quantize_roles": ["expert", "shared_expert", "mlp"],
    "evaluation": {"source": "demo"},
    "evaluation_row_tokens": ROW_TOKENS,
}
# What llama.cpp rounds activations to, by the type of the weight (ggml-cpu.c, type_traits_cpu: vec_dot_type).
ACTIVATIONS = {"Q4_0": "Q8_0", "Q8_0": "Q8_0", "BF16": "BF16", "F16": "F16"}
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16}


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """fp32 activations rounded as a kernel of llama.cpp rounds them."""
    if kind in FLOATS:
        return x.to(FLOATS[kind]).to(torch.float32)
    type_ = GGMLQuantizationType[kind]
    flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]).numpy())
    return torch.from_numpy(np.array(dequantize(quantize(flat, type_), type_))).view(x.shape)


@contextmanager
def rounding(kinds: dict[int, str]) -> Iterator[None]:
    """While open, the inputs of a weight are rounded first. `kinds`: address of the weight's storage -> rounding."""
    linear = nn.functional.linear

    def with_rounding(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        kind = kinds.get(weight.untyped_storage().data_ptr())
        return linear(rounded(x, kind) if kind else x, weight, bias)

    with mock.patch.object(nn.functional, "linear", with_rounding):
        yield


def stored_kind(model: Model, module: str) -> str:
    """The type in which the file stores a module."""
    weight = model.packed.get(f"{module}.weight")
    return weight.width if weight is not None else model.source.info(f"{module}.weight").dtype


def rounding_of(model: Model, block: nn.Module, index: int) -> dict[int, str]:
    """Address of each weight's storage -> the type to which llama.cpp rounds its inputs."""
    kinds = {}
    for _, module, _, _ in model.adapter.modules(index):
        kind = ACTIVATIONS.get(stored_kind(model, module))
        local = module.removeprefix(model.adapter.block_prefix(index))
        stacks = next(m for m in block.modules() if isinstance(m, RoutedExperts)) if ".experts." in local else None
        if stacks is not None:
            weight = stacks.down if local.endswith("down_proj") else stacks.gate_up
        else:
            weight = block.get_submodule(local).weight
        if kind:
            kinds[weight.untyped_storage().data_ptr()] = kind
    return kinds


def walk(model: Model, rows: list[Row], as_llamacpp: bool) -> torch.Tensor:
    """Logits [N, T, V] of rows of one length by our walk in fp32; `as_llamacpp`: with rounded activations."""
    adapter = model.adapter
    tokens = sum(len(row.tokens) for row in rows)
    ours = Walk.over(adapter, model.source, Compute(device=CPU, dtype=torch.float32, batch_tokens=tokens))
    hidden = Embedder(ours, rows).batch(list(range(len(rows))))
    for index in range(adapter.n_blocks):
        block = ours.load(index)
        for part in block.layer.parameters():  # widened at once, so that its storage identifies a weight
            part.data = part.data.to(torch.float32)
        with rounding(rounding_of(model, block.layer, index) if as_llamacpp else {}):
            hidden = block.forward(hidden)
    norm, head = ours.final_norm(), ours.head()
    kind = ACTIVATIONS.get(stored_kind(model, adapter.head_name.removesuffix(".weight")))
    with torch.inference_mode():
        last = norm(hidden)
        return (rounded(last, kind) if as_llamacpp and kind else last) @ head.float().T


@dataclass(frozen=True)
class Llama:
    """The built program llama_ask."""

    program: Path
    build: Path

    def ask(self, *arguments: object) -> str:
        done = subprocess.run([str(a) for a in (self.program, *arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"llama_ask {arguments[0]} ended with {done.returncode}:\n{done.stderr}")
        return done.stdout

    def rows_file(self, rows: list[list[int]]) -> Path:
        path = self.build / "rows.txt"
        path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
        return path

    def logits(self, model: Path, rows: list[list[int]], columns: int) -> torch.Tensor:
        out = self.build / "logits.bin"
        self.ask("logits", model, self.rows_file(rows), out)
        return torch.from_numpy(np.fromfile(out, np.float32)).view(len(rows), -1, columns)

    def greedy(self, model: Path, rows: list[list[int]]) -> list[list[int]]:
        said = self.ask("generate", model, self.rows_file(rows), NEW_TOKENS)
        return [[int(word) for word in line.split()] for line in said.splitlines()]

    def tokenize(self, model: Path, texts: list[str]) -> list[list[int]]:
        path = self.build / "texts.bin"
        path.write_bytes(b"".join(text.encode() + b"\0" for text in texts))
        return [[int(word) for word in line.split()] for line in self.ask("tokenize", model, path).splitlines()]


def build_llama(peers: Path, build: Path) -> Llama:
    """Build llama.cpp's libraries with the peers' script, and our program against them."""
    llama_cpp(peers)
    home, program = peers / "llama.cpp", build / "llama_ask"
    libraries = [
        home / "build" / path
        for path in (
            "src/libllama.a",
            "ggml/src/libggml.a",
            "ggml/src/libggml-cpu.a",
            "ggml/src/libggml-base.a",
        )
    ]
    include = [f"-I{home / 'source' / path}" for path in ("include", "ggml/include")]
    command = ["c++", "-O2", "-std=c++17", *include, HERE / "llama_ask.cpp", "-o", program, *libraries]
    subprocess.run([str(part) for part in (*command, "-ldl", "-lm", "-lpthread")], check=True)
    return Llama(program, build)


def quantized(name: str, build: Path) -> Path:
    """Quantize to groups of 32, by the command line."""
    folder, recipe = build / "checkpoint", build / "llamacpp.yaml"
    shutil.rmtree(folder, ignore_errors=True)
    recipe.write_text(yaml.safe_dump(RECIPE | {"evaluation_rows": 4}))
    onecard("quantize", name, folder, "--recipe", recipe)
    return folder


def to_gguf(model: Model, out: Path, floats: str | None) -> Model:
    """Write the GGUF file into a folder of its own, and open that."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    planned = gguf_write.plan(model.adapter, model.source, model.path, out.name, floats)
    gguf_write.write(planned, model.adapter, model.source, out / gguf_write.FILE_NAME)
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config))
    return open_model(str(out))


def divergence(p: torch.Tensor, q: torch.Tensor) -> dict[str, float]:
    """KL(p || q) of each token in nats, fp64, from logits [N, T, V]."""
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = (a.exp() * (a - b)).sum(-1)
    same = p.argmax(-1) == q.argmax(-1)
    return {"mean": float(kl.mean()), "max": float(kl.max()), "same_top1": float(same.double().mean())}


def row_tokens(adapter: Adapter) -> int:
    return min(ROW_TOKENS, words.context_tokens(adapter))


def held_out(source: Model, build: Path, count: int) -> list[Row]:
    """Full rows of the evaluation texts without pictures."""
    path, length = build / "rows.yaml", row_tokens(source.adapter)
    path.write_text(yaml.safe_dump(RECIPE | {"evaluation_rows": 4 * count, "evaluation_row_tokens": length}))
    rows = prepare_texts(source, load_recipe(str(path)), None, None, needs_calibration=False).evaluation
    return [row for row in rows if row.pixels is None and len(row.tokens) == length][:count]


def compare_logits(llama: Llama, files: dict[str, Model], rows: list[Row]) -> dict[str, Any]:
    """Compare every file by llama.cpp and by both walks, and the files with each other."""
    ids = [row.tokens.tolist() for row in rows]
    said, walked, table = {}, {}, {}
    for name, model in files.items():
        file = model.path / gguf_write.FILE_NAME
        said[name] = llama.logits(file, ids, model.adapter.vocab_size)
        walked[name] = walk(model, rows, as_llamacpp=False)
        table[name] = {
            "type": model.source.label,  # type: ignore[union-attr]
            "bytes": file.stat().st_size,
            "walk": divergence(walked[name], said[name]),
            "walk_rounding_activations": divergence(walk(model, rows, as_llamacpp=True), said[name]),
        }
    between = {
        "llama.cpp: codes in F32 || codes": divergence(said["codes, F32"], said["codes"]),
        "walk: codes || codes in F32": divergence(walked["codes"], walked["codes, F32"]),
        "walk: original || codes": divergence(walked["original"], walked["codes"]),
        "llama.cpp: original in F32 || codes in F32": divergence(said["original, F32"], said["codes, F32"]),
        "llama.cpp: original || codes": divergence(said["original"], said["codes"]),
    }
    return {"files": table, "between": between}


def compare_texts(
    llama: Llama, files: dict[str, Model], checkpoint: Path, bf16: Path, prompts: list[list[int]], python: Path
) -> dict[str, Any]:
    """Each engine's greedy texts beside transformers' from the checkpoint."""
    model = open_model(str(checkpoint))
    ends = {
        token for config in (model.adapter.config, model.adapter.text_config) for token in gguf_write.stops_at(config)
    }
    told = greedy.by_transformers(checkpoint, prompts, ends, NEW_TOKENS)
    found = {
        f"llama.cpp, {name}": llama.greedy(files[name].path / gguf_write.FILE_NAME, prompts)
        for name in ("codes", "codes, F32", SAME)
    }
    if python.exists():
        folder = text_model(bf16, llama.build / "text-model")
        found[VLLM] = greedy.by_vllm(python, folder, prompts, llama.build / "vllm", NEW_TOKENS)
    return {name: greedy.compare(texts, told) for name, texts in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--build", type=Path, default=BUILD, help="where vLLM's environment is, and files are written")
    parser.add_argument("--peers", type=Path, default=Path(os.environ.get("PEERS_BUILD", ROOT / "build" / "peers")))
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    build = given.build.resolve() / "llamacpp" / Path(given.model).name
    build.mkdir(parents=True, exist_ok=True)
    llama = build_llama(given.peers.resolve(), build)
    source = open_model(given.model)
    checkpoint = given.checkpoint or quantized(given.model, build)
    codes, bf16 = open_model(str(checkpoint)), exported(checkpoint, build / "bf16")
    files = {
        "original": to_gguf(source, build / "original", None),
        "original, F32": to_gguf(source, build / "original-f32", "F32"),
        "codes": to_gguf(codes, build / "codes", None),
        "codes, F32": to_gguf(codes, build / "codes-f32", "F32"),
        SAME: to_gguf(open_model(str(bf16)), build / "bf16-f32", "F32"),
    }
    rows = held_out(source, build, given.rows)
    ids = [row.tokens.tolist() for row in rows]
    texts = compare_texts(
        llama, files, checkpoint, bf16, [row[:PROMPT_TOKENS] for row in ids[: given.prompts]], interpreter(given.build)
    )
    decoded = prepared_texts(source, ids)
    wanted = [encode(source, text) for text in decoded]
    tokens = llama.tokenize(files["codes"].path / gguf_write.FILE_NAME, decoded)
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {"llama.cpp": f"of {LLAMA}"} | {name: version(name) for name in PACKAGES},
        "model": given.model,
        "rows": len(rows),
        "row_tokens": len(ids[0]),
        **compare_logits(llama, files, rows),
        "greedy_beside_transformers": texts,
        "tokenizer": {"texts": len(decoded), "same": sum(a == b for a, b in zip(tokens, wanted, strict=True))},
    }
    print(json.dumps(result, indent=1))
    (build / "llamacpp.json").write_text(json.dumps(result, indent=1))
    return int(not sound(result))


def prepared_texts(source: Model, ids: list[list[int]]) -> list[str]:
    """The rows as text, special tokens written out, without the first token, which a tokenizer adds."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source.path / "tokenizer.json"))
    return [tokenizer.decode(row[1:], skip_special_tokens=False) for row in ids]


def encode(source: Model, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(source.path / "tokenizer.json")).encode(text).ids)


def sound(result: dict[str, Any]) -> bool:
    """Whether all bounds of the head of this file hold."""
    files, texts = result["files"], result["greedy_beside_transformers"]
    return (
        all(entry["walk"]["mean"] <= MOST_KL for entry in files.values())
        and all(files[name]["walk"]["mean"] <= MOST_EXACT_KL for name in files if name.endswith("F32"))
        and all(text["same"] == text["texts"] for name, text in texts.items() if "bf16 export" in name)
        and all(
            files[name]["walk_rounding_activations"]["mean"] <= (1 - LEAST_EXPLAINED) * files[name]["walk"]["mean"]
            for name in ("original", "codes")
        )
        and all(margin <= MOST_MARGIN for text in texts.values() for margin in text["margins_where_they_part"])
        and result["tokenizer"]["same"] == result["tokenizer"]["texts"]
    )


if __name__ == "__main__":
    sys.exit(main())
