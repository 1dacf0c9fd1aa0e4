"""llama.cpp: its converter, llama-imatrix and llama-quantize, built from the llama-cpp-python source package.

The importance matrix comes from the calibration rows. Their tokens are written back as text and read with special
tokens and no added BOS, in contexts of the row length, or of Llama 4's attention chunk where that is shorter: llama.cpp
hard-codes a chunk of 8192, so a longer context would be another model. The converter refuses an unknown tokenizer; its
question is answered with Llama 3's split, which is the embedded tokenizer's. The token embedding and the head stay BF16
unless `default` asks for llama-quantize's own choice.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from contract import Job, alias, run

BUILD = Path(os.environ.get("PEERS_BUILD", "build/peers")) / "llama.cpp"
PRE_TOKENIZER = "llama-bpe"
KEEP = ("--token-embedding-type", "bf16", "--output-tensor-type", "bf16")
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate_exps": "experts.{}.gate_proj",
    "ffn_up_exps": "experts.{}.up_proj",
    "ffn_down_exps": "experts.{}.down_proj",
    "ffn_gate_shexp": "shared_expert.gate_proj",
    "ffn_up_shexp": "shared_expert.up_proj",
    "ffn_down_shexp": "shared_expert.down_proj",
}


def convert(model: Path, out: Path) -> None:
    """Run the converter as a program of its own, with the answer to its question for the tokenizer's name."""
    source = BUILD / "source"
    answer = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); import conversion.base as b;"
        f"b.TextModel.get_vocab_base_pre = lambda self, tokenizer: {PRE_TOKENIZER!r};"
        "script = sys.argv[1] + '/convert_hf_to_gguf.py'; sys.argv = [script, *sys.argv[2:]];"
        "runpy.run_path(script, run_name='__main__')"
    )
    command = [sys.executable, "-c", answer, str(source), str(model), "--outtype", "bf16", "--outfile", str(out)]
    subprocess.run(command, check=True)


def importance(job: Job, model: Path) -> Path:
    from tokenizers import Tokenizer

    rows = job.rows()
    tokenizer = Tokenizer.from_file(str(job.model / "tokenizer.json"))
    text, out = job.folder / "rows.txt", job.folder / "imatrix.gguf"
    text.write_text(tokenizer.decode(rows.flatten().tolist(), skip_special_tokens=False), encoding="utf-8")
    config = json.loads((job.model / "config.json").read_text())
    context = min(rows.shape[1], config.get("text_config", config).get("attention_chunk_size", rows.shape[1]))
    command = [
        str(BUILD / "bin" / "llama-imatrix"),
        "-m",
        str(model),
        "-f",
        str(text),
        "-o",
        str(out),
        "--parse-special",
    ]
    command += ["-c", str(context), "-b", "512", "-ub", "512", "-t", os.environ.get("OMP_NUM_THREADS", "1"), "--no-ppl"]
    command += ["--override-kv", "tokenizer.ggml.add_bos_token=bool:false"]
    subprocess.run(command, check=True)
    return out


def quantize(job: Job) -> None:
    job.checkpoint.mkdir()
    source = job.folder / "source.gguf"
    convert(job.model, source)
    command = [str(BUILD / "bin" / "llama-quantize")]
    if job.options.get("imatrix"):
        command += ["--imatrix", str(importance(job, source))]
    if not job.options.get("default"):
        command += KEEP
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    kind = job.options["type"]
    if kind == "BF16":
        source.rename(job.checkpoint / "model.gguf")
        return
    subprocess.run([*command, str(source), str(job.checkpoint / "model.gguf"), kind, threads], check=True)
    source.unlink()


def dense(job: Job) -> dict[str, object]:
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    canonical = {str(alias(name)): name for name in job.source() if alias(name)}
    out, types = {}, {}
    for tensor in GGUFReader(job.checkpoint / "model.gguf").tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        stem, _, leaf = tensor.name.removesuffix(".weight").rpartition(".")
        known = NAMES.get(leaf)
        if known is not None:
            types[tensor.name] = tensor.tensor_type.name
            block = stem.removeprefix("blk.")
            # The family's own word in between: feed_forward or mlp.
            middle = "" if known.startswith("self_attn") else "feed_forward." if job.family == "llama4" else "mlp."
            for number, part in enumerate(values if "{}" in known else [values]):
                out[canonical[f"layers.{block}.{middle}{known.format(number)}.weight"]] = part
        elif tensor.name in ("token_embd.weight", "output.weight"):
            types[tensor.name] = tensor.tensor_type.name
            out[canonical["embed_tokens.weight" if leaf == "token_embd" else "lm_head.weight"]] = values
    (job.folder / "types.json").write_text(json.dumps(types, indent=1))
    return out


if __name__ == "__main__":
    run(quantize, dense, ("gguf", "torch", "transformers"))
