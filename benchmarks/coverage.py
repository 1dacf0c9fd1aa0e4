"""Starved experts: each expert's output error relative to round-to-nearest, and what balancing rows gains.

    python benchmarks/coverage.py [--seeds 3] [--rows 64] [--only balanced]

The routers of a copy of the embedded model are bent: in every block one expert's logits are lowered until it gets under
0.1 % of the calibration tokens. All runs calibrate on the same number of rows. One run takes the pool's first rows, the
others choose among all of them. Held-out tokens come from the evaluation texts. Three errors are measured for every
expert of every block, on the held-out tokens that the original sends to it, relative to round-to-nearest:

- alone: the squared error of the expert's output, both experts reading the original's input. A corrected expert leaves
  its own output on purpose, to repair earlier errors; this measure is for runs without reference correction;
- in the model: the squared error of the block's output, relative to the row, each model on its own stream;
- routed alike: the same, for the tokens that both models have routed the same way so far. A token that an earlier
  router sent to another expert brings an error along that no later expert has made.

Prints one line a run with the worst ratio of the starved experts and of all, and a summary.
"""

import argparse
import dataclasses
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from onecard.calibration.sources import read_jsonl
from onecard.calibration.tokens import Encoder
from onecard.checkpoint.model import open_model
from onecard.core.device import Compute
from onecard.core.rows import Row, batches
from onecard.demo import corpus
from onecard.models.adapter import Adapter, Role, Site, read
from onecard.models.known import demo_folder
from onecard.models.walk import Embedder, Walk
from onecard.pipeline import Options, quantize
from onecard.recipe import Recipe

SHARE = 0.0008  # of the tokens: under 0.1 %
TARGETS = (15, 2, 8, 10)  # the starved expert of each block: the model's own least used, so that the bend is small
COMPUTE = Compute(device=torch.device("cpu"), dtype=torch.float32, batch_tokens=16384)


def rows_of(folder: Path, which: str, tokens: int) -> list[Row]:
    """The beginnings of the embedded texts without pictures."""
    model = open_model(str(folder))
    encoder = Encoder(model.path, model.adapter)
    documents = [d for d in read_jsonl(demo_folder() / "data" / f"{which}.jsonl") if not d.images]
    rows = encoder.encode_all(documents)
    return [dataclasses.replace(row, tokens=row.tokens[:tokens]) for row in rows if len(row.tokens) >= tokens]


def bend(folder: Path) -> None:
    """Move the router rows of the target experts, block by block."""
    shutil.copytree(demo_folder() / "model", folder)
    rows = rows_of(folder, "calibration", 256)[:120]
    state = load_file(folder / "model.safetensors")
    model = open_model(str(folder))
    adapter, groups = model.adapter, batches(rows, COMPUTE.batch_tokens)
    walk = Walk.over(adapter, model.source, COMPUTE)
    embedder = Embedder(walk, rows)
    hidden = [embedder.batch(group) for group in groups]
    for index, target in enumerate(TARGETS):
        block = walk.load(index)
        feed_forward = block.layer.get_submodule("feed_forward")
        router: Any = feed_forward.get_submodule("router")
        seen: list[torch.Tensor] = []
        handle = feed_forward.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
        for k in range(len(groups)):
            block.forward(hidden[k])
        handle.remove()
        x_TH = torch.cat(seen)
        one_H = _bias_direction(x_TH)
        row_H = router.weight[target].clone()
        shares = {}
        for shift in (x / 4 for x in range(1, 161)):
            router.weight.data[target] = (row_H - shift * one_H).bfloat16().float()
            shares[shift] = float((F.linear(x_TH, router.weight).argmax(-1) == target).float().mean())
            if shares[shift] <= SHARE:
                break
        shift = min(shares, key=lambda x: shares[x])
        router.weight.data[target] = (row_H - shift * one_H).bfloat16().float()
        print(f"block {index}: expert {target} lowered by {shift:g}, {shares[shift]:.3%} of the tokens", flush=True)
        name = f"{adapter.block_prefix(index)}feed_forward.router.weight"
        state[name][target] = router.weight[target].bfloat16()
        hidden = [block.forward(h) for h in hidden]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _bias_direction(x_TH: torch.Tensor) -> torch.Tensor:
    """v with x v >= 1 for nearly all tokens, because a router has no bias that could be lowered.

    Least squares, repeated with growing weights for tokens that fall short."""
    weight_T, target_T = torch.ones(len(x_TH)), torch.ones(len(x_TH))
    for _ in range(12):
        wx = x_TH * weight_T[:, None]
        v_H = torch.linalg.solve(wx.T @ x_TH + 1e-4 * len(x_TH) * torch.eye(x_TH.shape[1]), wx.T @ target_T)
        weight_T = torch.where(x_TH @ v_H < 1, 300.0, 1.0)
    return v_H


def own_rows(folder: Path, rows: list[Row]) -> dict[tuple[int, int], torch.Tensor]:
    """(block, expert) -> its inputs from the held-out tokens."""
    model = open_model(str(folder))
    walk, found = Walk.over(model.adapter, model.source, COMPUTE), dict[tuple[int, int], list[torch.Tensor]]()
    embedder = Embedder(walk, rows)
    hidden = [embedder.batch(group) for group in batches(rows, COMPUTE.batch_tokens)]
    for index in range(model.adapter.n_blocks):
        block = walk.load(index)

        def observe(site: Site, expert: int, _: torch.Tensor, x: torch.Tensor, index: int = index) -> None:
            if site.role is Role.EXPERT and site.feeds:
                found.setdefault((index, expert), []).append(x.clone())

        with block.observed(observe):
            hidden = [block.forward(h) for h in hidden]
    return {place: torch.cat(parts) for place, parts in found.items()}


def expert(adapter: Adapter, source: Any, block: int, number: int, x_RH: torch.Tensor) -> torch.Tensor:
    stem = f"{adapter.block_prefix(block)}feed_forward.experts.{number}."
    gate, up, down = (read(adapter, source, f"{stem}{n}_proj.weight").float() for n in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x_RH, gate)) * F.linear(x_RH, up), down)


def alone(folder: Path, out: Path, own: dict[tuple[int, int], torch.Tensor]) -> dict[tuple[int, int], float]:
    """Each expert's squared output error on its own held-out tokens, relative to the squared output."""
    model, quantized = open_model(str(folder)), open_model(str(out))
    found = {}
    for place, x_RH in own.items():
        exact = expert(model.adapter, model.source, *place, x_RH)
        found[place] = float((expert(model.adapter, quantized.source, *place, x_RH) - exact).square().sum())
        found[place] /= float(exact.square().sum())
    return found


@dataclasses.dataclass(frozen=True)
class Block:
    """One block, for each held-out token: the original's expert, the relative squared error of the block's output, and
    whether both models have routed the token alike up to and including this block."""

    routes_TK: torch.Tensor
    error_T: torch.Tensor
    alike_T: torch.Tensor


def in_model(folder: Path, out: Path, rows: list[Row]) -> list[Block]:
    """Each model on its own stream."""
    sides = [open_model(str(folder)), open_model(str(out))]
    groups = batches(rows, COMPUTE.batch_tokens)
    walks = [Walk.over(side.adapter, side.source, COMPUTE) for side in sides]
    embedders = [Embedder(walk, rows) for walk in walks]
    streams = [[embedder.batch(group) for group in groups] for embedder in embedders]
    alike_T = torch.ones(sum(len(row.tokens) for row in rows), dtype=torch.bool)
    found = []
    for index in range(sides[0].adapter.n_blocks):
        blocks = [walk.load(index) for walk in walks]
        errors, routes = [], [list[torch.Tensor](), list[torch.Tensor]()]
        for k in range(len(groups)):
            for stream, block, taken in zip(streams, blocks, routes, strict=True):
                passed = block.routed(stream[k])
                assert passed.routes_TK is not None
                stream[k] = passed.hidden
                taken.append(passed.routes_TK)
            exact, miss = streams[0][k].flatten(0, 1), (streams[1][k] - streams[0][k]).flatten(0, 1)
            errors.append(miss.square().sum(-1) / exact.square().sum(-1))
        theirs, ours = map(torch.cat, routes)
        alike_T = alike_T & (theirs == ours).all(-1)
        found.append(Block(theirs, torch.cat(errors), alike_T))
    return found


def by_expert(now: list[Block], base: list[Block], alike: bool) -> tuple[dict[tuple[int, int], float], ...]:
    """Mean errors of two runs over the tokens of each expert; `alike`: over the tokens that both routed alike."""
    errors: tuple[dict[tuple[int, int], float], ...] = ({}, {})
    for index, blocks in enumerate(zip(now, base, strict=True)):
        chosen_T = blocks[0].alike_T & blocks[1].alike_T if alike else torch.ones_like(blocks[0].alike_T)
        for number in blocks[0].routes_TK[chosen_T].unique().tolist():
            own_T = chosen_T & (blocks[0].routes_TK == number).any(-1)
            for found, block in zip(errors, blocks, strict=True):
                found[index, number] = float(block.error_T[own_T].mean())
    return errors


def worst(errors: dict[tuple[int, int], float], base: dict[tuple[int, int], float]) -> tuple[float, float]:
    """The greatest ratio to `base` among the starved experts, and among all."""
    ratios = {place: errors[place] / base[place] for place in errors}
    return max(ratios[place] for place in enumerate(TARGETS) if place in ratios), max(ratios.values())


SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {"method": "fast"},
    "balanced": {"method": "balanced"},
    "best": {"method": "best"},
    "fast, no reference correction": {"method": "fast", "reference_correction": False},
    "best, no reference correction": {"method": "best", "reference_correction": False, "tune_epochs": 0},
    "balanced, no reference correction": {"method": "balanced", "reference_correction": False},
    "balanced, no correction, no output metric": {
        "method": "balanced",
        "reference_correction": False,
        "output_blocks": 0,
    },
    "pool 4, half random": {"method": "balanced", "calibration_pool": 4.0},
    "pool 4, none random": {"method": "balanced", "calibration_pool": 4.0, "calibration_random_share": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--only", action="append", help="settings whose name begins with this")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="onecard-coverage-") as name:
        folder, out = Path(name) / "bent", Path(name) / "out"
        bend(folder)
        held_out = rows_of(folder, "evaluation", 256)
        own = own_rows(folder, held_out)
        texts = corpus.write_plain_texts(Path(name))
        starved = ", ".join(str(len(own.get(place, ()))) for place in enumerate(TARGETS))
        print(f"held-out tokens of the starved experts: {starved}", flush=True)
        common = {
            "name": "coverage",
            "description": "benchmark",
            "calibration_rows": options.rows,
            "calibration_row_tokens": 256,
            "evaluation_rows": 64,
            "evaluation_row_tokens": 256,
        }

        def run(**fields: Any) -> tuple[Any, dict[tuple[int, int], float], list[Block]]:
            recipe = Recipe.model_validate(common | fields)
            record = quantize(str(folder), out, recipe, Options("cpu", overwrite=True, **texts), quiet=True)
            return record, alone(folder, out, own), in_model(folder, out, held_out)

        record, alone_base, model_base = run(method="rtn")
        print(f"round-to-nearest: kl {record.kl['kl_mean_nats']:.5f}")
        for seed in range(options.seeds):
            for label, fields in SETTINGS.items():
                if options.only and not any(label.startswith(only) for only in options.only):
                    continue
                record, alone_now, model_now = run(calibration_seed=seed, **fields)
                rows = [block["expert_rows"][target] for block, target in zip(record.blocks, TARGETS, strict=True)]
                line = {"kl": record.kl["kl_mean_nats"], "starved rows": sum(rows), "least": min(rows)}
                line["alone: starved"], line["all"] = worst(alone_now, alone_base)
                line["in the model: starved"], line["all experts"] = worst(*by_expert(model_now, model_base, False))
                line["routed alike: starved"], line["every expert"] = worst(*by_expert(model_now, model_base, True))
                results.setdefault(label, []).append(line)
                print(f"seed {seed}  {label:<42}" + "  ".join(f"{k} {v:.5g}" for k, v in line.items()), flush=True)
    print("\nover the seeds: means; for ratios the worst")
    for label, lines in results.items():
        over = {
            k: (statistics.mean if k in ("kl", "starved rows", "least") else max)(x[k] for x in lines) for k in lines[0]
        }
        print(f"{label:<42}" + "  ".join(f"{key} {value:.5g}" for key, value in over.items()))


if __name__ == "__main__":
    main()
