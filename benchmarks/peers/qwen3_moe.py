"""The second model of the comparison: a small Qwen3-MoE, trained here for about a quarter of an hour.

    python benchmarks/peers/qwen3_moe.py build/peers/models/qwen3-moe

It has Qwen3-30B-A3B's structure (softmax router with top-k over 16 experts, routing weights on the experts' outputs,
QK-norm with weights, no shared expert, untied head) and the embedded model's size. It reads the same training split of
the standard library with the embedded model's tokenizer, so both models share calibration, choice and test texts. Every
input dimension is a multiple of 128 and no expert is square. Seeds are fixed: the same Python and torch give the same
steps.
"""

import argparse
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from onecard.demo import corpus, packs, tokens

DEMO_MODEL = Path(tokens.__file__).parent / "model"
STEPS, ROWS = 1200, 8  # of 512 tokens: 4.9 million tokens
PEAK_RATE, LAST_SHARE, WARM_UP_STEPS, WEIGHT_DECAY = 2e-3, 0.03, 100, 0.1
BALANCE_WEIGHT = 0.01  # transformers' load balancing loss, which is top-k at perfect balance


def config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=tokens.VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        decoder_sparse_step=1,
        moe_intermediate_size=256,
        num_experts_per_tok=2,
        num_experts=16,
        norm_topk_prob=True,
        mlp_only_layers=[],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        router_aux_loss_coef=BALANCE_WEIGHT,
        bos_token_id=0,
        eos_token_id=4,
        pad_token_id=11,
        use_cache=False,
    )


def rate(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: linear warm-up, then a cosine to LAST_SHARE."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    through = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * through))


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the comparison's small Qwen3-MoE.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    torch.set_num_threads(1)  # another number of threads rounds sums differently
    tokenizer = tokens.load(DEMO_MODEL)
    text = packs.text_packs(tokenizer, corpus.documents("train"), given.steps * ROWS, given.seed)
    model = Qwen3MoeForCausalLM(config()).float().train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} rows", flush=True)
    began = time.monotonic()
    for step in range(given.steps):
        rows = np.stack([pack.tokens for pack in text[step * ROWS : (step + 1) * ROWS]])
        ids = torch.from_numpy(rows).long()
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate(step, given.steps)
        out = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == given.steps - 1:
            print(f"step {step}: loss {out.loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    unfinished = given.output.with_name(given.output.name + ".unfinished")
    model.to(torch.bfloat16).save_pretrained(unfinished)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        shutil.copy(DEMO_MODEL / name, unfinished / name)
    unfinished.rename(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
