"""llm-compressor: GPTQ (W4A16, symmetric, static activation order, as it recommends) and AWQ through its own `oneshot`.

It computes in fp32, as onecard does on a CPU: most CPUs emulate bf16, which took several times as long. The model is
cast back to bf16 to be stored, which changes no code (a code moves by 0.03 of a step at most). On a CPU it also needs
the sequential targets by name and a cache that does not pin memory. AWQ needs mappings that leave the vision tower out;
the default ones match it and fail. `all_experts` is its `moe_calibrate_all_experts`. llm-compressor unfuses a fused
checkpoint itself; every tensor is stored under its unfused name.
"""

import json

from contract import Job, canonical_modules, modules_of, run

LAYERS = {"llama4": "Llama4TextDecoderLayer", "qwen3_moe": "Qwen3MoeDecoderLayer", "llama": "LlamaDecoderLayer"}
IGNORE = ["re:.*lm_head$", "re:.*router$", "re:.*mlp.gate$", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]


def _model(job: Job):  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration

    config = json.loads((job.model / "config.json").read_text())
    cls = Llama4ForConditionalGeneration if config["model_type"] == "llama4" else AutoModelForCausalLM
    return cls.from_pretrained(job.model, dtype=torch.float32)


def _scheme(job: Job) -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": job.group}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": IGNORE}


def _awq(job: Job) -> list[object]:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *args, **kwargs: None  # no GPU to pin memory for
    text = r"re:^(?!.*vision).*layers\.\d+\."
    router = "feed_forward.router" if job.family == "llama4" else "mlp.gate"
    mlp = "feed_forward" if job.family == "llama4" else "mlp"
    mappings = [
        AWQMapping(f"{text}input_layernorm$", [f"{text}self_attn.{n}_proj$" for n in "qkv"]),
        AWQMapping(f"{text}self_attn.v_proj$", [f"{text}self_attn.o_proj$"]),
        AWQMapping(
            f"{text}post_attention_layernorm$",
            [f"{text}{router}$", rf"{text}{mlp}\..*gate_proj$", rf"{text}{mlp}\..*up_proj$"],
        ),
        AWQMapping(rf"{text}{mlp}\..*up_proj$", [rf"{text}{mlp}\..*down_proj$"]),
    ]
    return [AWQModifier(mappings=mappings), QuantizationModifier(**_scheme(job))]


def quantize(job: Job) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = job.rows().tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = _model(job)
    recipe = _awq(job) if job.options["method"] == "awq" else [GPTQModifier(**_scheme(job), actorder="static")]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
        sequential_targets=[LAYERS[job.family]],
        moe_calibrate_all_experts=job.options["all_experts"],
    )
    model.to(torch.bfloat16).save_pretrained(job.checkpoint, save_compressed=True)


def dense(job: Job) -> dict[str, object]:
    import torch
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((job.checkpoint / "config.json").read_text())["quantization_config"]
    scheme = next(iter(QuantizationConfig.model_validate(config).config_groups.values()))
    held, out = modules_of(job.checkpoint), {}
    for module, name in canonical_modules(job).items():
        parts = held.get(module)
        if parts is None:  # left fused and unquantized; the judge counts it so
            continue
        if "weight_packed" not in parts:
            out[name] = parts["weight"]
            continue
        # Scales in fp32, so that the product is not rounded to bf16 again.
        parts = parts | {"weight_scale": parts["weight_scale"].to(torch.float32)}
        out[name] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    return out


if __name__ == "__main__":
    run(quantize, dense, ("llmcompressor", "compressed-tensors", "transformers", "torch"))
