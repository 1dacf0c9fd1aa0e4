"""auto-round: signed gradients on rounding and clipping, 200 steps a block, its default symmetric scheme.

Given the model object, auto-round itself replaces the experts of both families with one Linear an expert, and then
quantizes the text blocks. Rows are given as its data set, one dictionary a row. For the multimodal class it insists on
a processor, though rows of token ids never reach one; the tokenizer stands in for it. It stores its own format, whose
tensors have the GPTQ layout, version 1.
"""

import json

from contract import Job, canonical_modules, gptq_weight, modules_of, run, store_as_bf16

ITERATIONS = 200


def quantize(job: Job) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer, Llama4ForConditionalGeneration

    rows = job.rows()
    multimodal = json.loads((job.model / "config.json").read_text())["model_type"] == "llama4"
    cls = Llama4ForConditionalGeneration if multimodal else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tool = AutoRound(
        cls.from_pretrained(job.model, dtype=torch.float32),
        tokenizer,
        processor=tokenizer if multimodal else None,
        scheme="W4A16",
        group_size=job.group,
        iters=job.options.get("iterations", ITERATIONS),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows],
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,  # compiling a block of small matrices takes longer than tuning it
    )
    tool.quantize_and_save(str(job.checkpoint), format="auto_round")
    store_as_bf16(job.checkpoint)


def dense(job: Job) -> dict[str, object]:
    held, out = modules_of(job.checkpoint), {}
    for module, name in canonical_modules(job).items():
        parts = held.get(module)
        if parts is None:  # left fused and unquantized; the judge counts it so
            continue
        out[name] = gptq_weight(parts, job.group, version=1) if "qweight" in parts else parts["weight"]
    return out


if __name__ == "__main__":
    run(quantize, dense, ("auto-round", "transformers", "torch"))
