"""Trains the demo model: `python -m onecard.demo.train` reads the standard library and writes demo/model and demo/data.

The number of steps is fixed, every draw is seeded, and AdamW has a warm-up and a cosine. In the first stage each batch
holds text, questions and pictures. In the second the language side is frozen, and the vision tower and projector learn
from pictures alone: they need longer to tell digits apart than the text needs, and a row of pictures without text is
cheap. Two small losses on the router join the likelihood of the next token: Switch Transformer's balance loss (Fedus et
al. 2021, equation 4), without which some experts would never be used, and ST-MoE's z-loss (Zoph et al. 2022), which
keeps the logits small. Weights are float32 in training and saved in bf16. README.md has the results, and measure.py
measures them.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Llama4ForConditionalGeneration

from . import corpus, data, network, packs, tokens
from .questions import Fact, facts

HERE = Path(__file__).parent
STEPS = 2400  # about 25 minutes on two idle CPU cores
TEXT_ROWS, QUESTION_ROWS, PICTURE_ROWS = 5, 1, 2  # rows of 512 tokens in each batch
PEAK_RATE, LAST_SHARE = 1.5e-3, 0.03  # a model 128 wide takes several times the rate of one a thousand wide
VISION_RATE = 1e-3  # tower and projector; at 3e-3 they stay on the plateau where captions are guessed
DRAWINGS = 40_000  # in each stage; each is seen about twice
SECOND_STEPS, SECOND_ROWS = 2000, 2  # the second stage takes about six minutes
WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.1  # of matrices only
BALANCE_WEIGHT = 0.04  # at 0.02 the rarest expert got 1.4 % of held-out tokens; too high costs likelihood
Z_WEIGHT = 1e-4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m onecard.demo.train", description="Train the embedded demo model.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for model/ and data/ (default: demo/)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--second-steps", type=int, default=SECOND_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--snapshot", type=Path, help="also write the model folder here, again and again")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from if it is there; renewed with the snapshot")
    parser.add_argument("--snapshot-minutes", type=float, default=5.0)
    parser.add_argument("--resume-from", type=Path, help="a model folder: skip the first stage and take its weights")
    return parser.parse_args()


def rate(step: int, steps: int) -> float:
    """The factor on every peak learning rate: linear warm-up, then a cosine down to LAST_SHARE."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    through = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * through))


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        peak = PEAK_RATE if name.startswith("language_model.") else VISION_RATE
        groups.setdefault((peak, WEIGHT_DECAY if parameter.dim() >= 2 else 0.0), []).append(parameter)
    described = [{"params": ps, "peak": peak, "weight_decay": decay} for (peak, decay), ps in groups.items()]
    return torch.optim.AdamW(described, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def router_losses(layers: list[network.OwnRowsMoe]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(balance loss, z-loss, smallest share of the rows that an expert got); the losses are means over the layers."""
    balance, z, least = [], [], 1.0
    for layer in layers:
        logits_TE = layer.logits_TE
        share_E = logits_TE.argmax(1).bincount(minlength=logits_TE.shape[1]) / logits_TE.shape[0]
        balance.append(logits_TE.shape[1] * (share_E * logits_TE.softmax(1).mean(0)).sum())
        z.append(logits_TE.logsumexp(1).square().mean())
        least = min(least, float(share_E.min()))
    return torch.stack(balance).mean(), torch.stack(z).mean(), least


def token_losses(
    model: Llama4ForConditionalGeneration, batch: list[packs.Pack], drawn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative log-likelihood of every target and its weight, both [rows, 511]."""
    device = next(model.parameters()).device
    input_ids = torch.from_numpy(np.stack([pack.tokens for pack in batch])).long().to(device)
    weights = torch.from_numpy(np.stack([pack.weights for pack in batch])).to(device)
    numbers = [number for pack in batch for number in pack.pictures]
    pixels = (drawn[numbers].to(device).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5 if numbers else None
    logits = model(input_ids=input_ids, pixel_values=pixels, use_cache=False).logits[:, :-1]
    flat = functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(batch), -1), weights[:, 1:]


def losses(
    model: Llama4ForConditionalGeneration,
    layers: list[network.OwnRowsMoe],
    batch: list[packs.Pack],
    drawn: torch.Tensor,
) -> tuple[torch.Tensor, str]:
    """(the loss, a line for the log: mean losses of text, answers and captions, and the least expert's share)."""
    each, weights = token_losses(model, batch, drawn)
    balance, z, least = router_losses(layers)
    loss = (each * weights).sum() / weights.sum() + BALANCE_WEIGHT * balance + Z_WEIGHT * z
    answers = weights == packs.ANSWER_WEIGHT
    kinds = {
        "text": each[:TEXT_ROWS],
        "answers": each[TEXT_ROWS:-PICTURE_ROWS][answers[TEXT_ROWS:-PICTURE_ROWS]],
        "captions": each[-PICTURE_ROWS:][answers[-PICTURE_ROWS:]],
    }
    parts = [f"{kind} {float(values.detach().mean()):.3f}" for kind, values in kinds.items()]
    return loss, ", ".join([*parts, f"balance {balance.item():.3f}, least expert {least:.2%}"])


def write(model: Llama4ForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> int:
    tokens.save(tokenizer, folder)
    (folder / "LICENSE").write_text(data.LICENSE, encoding="utf-8")
    return network.save(model, folder)


@dataclass(frozen=True)
class Reading:
    """What the first stage reads: documents, facts, and the held-out items that it must not show."""

    rows: list[corpus.JsonRow]
    known: list[Fact]
    held: list[corpus.JsonRow]


def first_stage(
    given: argparse.Namespace,
    model: Llama4ForConditionalGeneration,
    layers: list[network.OwnRowsMoe],
    tokenizer: Tokenizer,
    reading: Reading,
) -> None:
    """Text, questions and pictures. Every parameter learns."""
    text = packs.text_packs(tokenizer, reading.rows, given.steps * TEXT_ROWS, given.seed)
    asked = packs.question_packs(tokenizer, reading.known, reading.held, given.steps * QUESTION_ROWS * 7)
    seen, drawn = packs.picture_packs(tokenizer, min(DRAWINGS, given.steps * PICTURE_ROWS * 15), given.seed)
    print(f"{len(text)} text, {len(asked)} question, {len(seen)} picture rows", flush=True)

    optimizer = optimizer_of(model)
    first_step = 0
    if given.checkpoint and given.checkpoint.exists():
        kept = torch.load(given.checkpoint, map_location=given.device, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first_step = kept["step"]
    started = saved = time.monotonic()
    for step in range(first_step, given.steps):
        batch = text[step * TEXT_ROWS : (step + 1) * TEXT_ROWS]
        batch += [asked[(step * QUESTION_ROWS + i) % len(asked)] for i in range(QUESTION_ROWS)]
        batch += [seen[(step * PICTURE_ROWS + i) % len(seen)] for i in range(PICTURE_ROWS)]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, given.steps)
        loss, line = losses(model, layers, batch, drawn)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now = time.monotonic()
        if step % 20 == 0 or step == given.steps - 1:
            print(f"step {step}: {loss.item():.3f}; {line}; {now - started:.0f} s", flush=True)
        if now - saved > 60 * given.snapshot_minutes:
            saved = now
            if given.snapshot:
                write(model, tokenizer, given.snapshot)
            if given.checkpoint:
                state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, given.checkpoint)


def second_stage(given: argparse.Namespace, model: Llama4ForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """New drawings only. Just the vision tower and the projector learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("language_model."))
    count = min(DRAWINGS, given.second_steps * SECOND_ROWS * 15)
    seen, drawn = packs.picture_packs(tokenizer, count, given.seed + 1)
    optimizer = optimizer_of(model)
    started = time.monotonic()
    for step in range(given.second_steps):
        batch = [seen[(step * SECOND_ROWS + i) % len(seen)] for i in range(SECOND_ROWS)]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, given.second_steps)
        each, weights = token_losses(model, batch, drawn)
        loss = each[weights == packs.ANSWER_WEIGHT].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == given.second_steps - 1:
            seconds = time.monotonic() - started
            print(f"second stage, step {step}: captions {loss.item():.3f}; {seconds:.0f} s", flush=True)


def main() -> int:
    given = arguments()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    rows = corpus.documents("train")
    known = facts([module for module in corpus.modules() if module.split == "train"])
    tokenizer = tokens.train(tokens.text_of(row) for row in rows)
    held = data.write(given.output / "data", tokenizer, rows, known)
    model = network.load(given.resume_from) if given.resume_from else network.build(given.seed)
    for folder in filter(None, (given.snapshot, given.output / "model")):
        parameters = write(model, tokenizer, folder) // 2
    layers = network.use_own_rows(model)
    model.to(given.device).train()
    print(f"{parameters:,} parameters", flush=True)
    if given.resume_from is None:
        first_stage(given, model, layers, tokenizer, Reading(rows, known, held))
    second_stage(given, model, tokenizer)
    for folder in filter(None, (given.snapshot, given.output / "model")):
        write(model, tokenizer, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
