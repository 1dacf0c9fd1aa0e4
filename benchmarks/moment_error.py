"""Errors of second moments and misses by how their products are computed: `python benchmarks/moment_error.py [MODEL]`.

A walk in bf16 gives real rows x, as on a GPU; the quantized stream is that of the blocks rounded to the nearest int4.
For every site and expert of the model two sums are taken: w x x^T, with w the recipe's weight by residual, and w m x^T,
with m what x misses of the original's rows. Ways to compute them:

- fp32, as a CPU does; TF32: both sides rounded to 11 bits; w x or w m, which are fp32, cut into bf16 parts;
- roots: both sides scaled by the root of w and rounded to bf16, which is what a GPU does (calibration/moments.py).

Each sum is compared with fp64: relative Frobenius norm, the mean and the largest over sites and experts. "Products
alone" sums in fp64, so that nothing but the rounding is seen; with fp32 sums each batch is added in fp32. The last line
is what a bf16 walk by itself changes, for scale: the same sums of a walk in fp32. `--kl` quantizes the model in bf16 by
a CPU's and by a GPU's arithmetic, and prints the mean KL.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from quantizers import recipe

from onecard.calibration.moments import scaled
from onecard.calibration.sensitivity import token_weights
from onecard.calibration.sources import read_jsonl
from onecard.calibration.tokens import Encoder
from onecard.checkpoint.model import Model, open_model
from onecard.core import device
from onecard.core.device import Compute
from onecard.core.products import bf16_parts
from onecard.core.rows import Row, batches
from onecard.demo import corpus
from onecard.models.adapter import Site
from onecard.models.block import Block
from onecard.models.known import demo_folder
from onecard.models.walk import Embedder, Walk
from onecard.pipeline import Options, quantize

BATCH_TOKENS = 8192
TOKENS, ROWS = 512, 32
GROUP = 128

Cut = Callable[[torch.Tensor], list[torch.Tensor]]
Sums = dict[tuple[str, str], torch.Tensor]  # (way, 'fp32 sums' or 'products alone') -> a sum, or its error


def tf32(x: torch.Tensor) -> list[torch.Tensor]:
    """Rounded to 11 significant bits."""
    return [((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)]


WAYS: dict[str, Cut] = {
    "fp32": lambda x: [x],
    "TF32": tf32,
    "1 bf16 part": lambda x: bf16_parts(x, 1),
    "2 bf16 parts": lambda x: bf16_parts(x, 2),
    "3 bf16 parts": lambda x: bf16_parts(x, 3),
}
ROOTS, WALK = "roots, in bf16", "(a walk in fp32)"


def rows_of(model: Model) -> list[Row]:
    encoder = Encoder(model.path, model.adapter)
    documents = [d for d in read_jsonl(demo_folder() / "data" / "calibration.jsonl") if not d.images]
    rows = [row for row in encoder.encode_all(documents) if len(row.tokens) >= TOKENS][:ROWS]
    return [dataclasses.replace(row, tokens=row.tokens[:TOKENS]) for row in rows]


def rounded(block: Block) -> Block:
    """The block with every matrix of its sites rounded to the nearest int4."""
    target = block.copy()
    for site in block.sites:
        for name in (name for member in site.members for name in member):
            weight = target.weight(name)
            grouped = weight.float().unflatten(-1, (-1, GROUP))
            scale = grouped.abs().amax(-1, keepdim=True) / 8
            weight.copy_(((grouped / scale).round().clamp(-8, 7) * scale).flatten(-2))
    return target


def seen(
    block: Block, hidden: torch.Tensor
) -> tuple[dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """The inputs of all sites, by (site key, expert): (token numbers, rows); and what leaves the block [T, H]."""
    found = {}

    def observe(site: Site, expert: int, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        found[site.key, expert] = (tokens, rows)

    with block.observed(observe):
        out = block.forward(hidden)
    return found, out


def batches_of_rows(
    model: Model, dtype: torch.dtype
) -> Iterator[tuple[int, dict[tuple[str, int], tuple[torch.Tensor, ...]]]]:
    """(block, {(site key, expert): (rows, weights, misses)}) for each batch of each block."""
    rows = rows_of(model)
    groups = batches(rows, BATCH_TOKENS)
    walk = Walk.over(model.adapter, model.source, Compute(torch.device("cpu"), dtype, BATCH_TOKENS))
    embedder = Embedder(walk, rows)
    theirs = [embedder.batch(group) for group in groups]
    ours = list(theirs)
    for index in range(model.adapter.n_blocks):
        original = walk.load(index)
        target = rounded(original)
        for k in range(len(groups)):
            (reference, theirs[k]), (quantized, ours[k]) = seen(original, theirs[k]), seen(target, ours[k])
            weight_T = token_weights(None, ours[k].flatten(0, 1), "residual")
            found = {}
            for place, (tokens, x) in quantized.items():
                their_tokens, their_x = reference.get(place, (tokens[:0], x[:0]))
                both = torch.isin(tokens, their_tokens)
                miss = torch.zeros(x.shape)
                miss[both] = their_x[torch.isin(their_tokens, tokens)].float() - x[both].float()
                found[place] = (x, weight_T[tokens], miss)
            yield index, found


def summed(model: Model, dtype: torch.dtype, ways: bool) -> dict[tuple[str, int, str, int], Sums]:
    """('moments' or 'misses', block, site key, expert) -> the sum in fp64, and by each of the ways."""
    sums: dict[tuple[str, int, str, int], Sums] = {}
    for index, found in batches_of_rows(model, dtype):
        for (key, expert), (x, weight, miss) in found.items():
            for what, rows in (("moments", x.float()), ("misses", miss)):
                own = sums.setdefault((what, index, key, expert), {})
                _add(own, "fp64", [rows.double() * weight.double()[:, None]], x.double())
                if ways:
                    for way, cut in WAYS.items():
                        other = tf32(x.float())[0] if way == "TF32" else x.float()
                        _add(own, way, cut(rows * weight[:, None]), other)
                    _add(own, ROOTS, [scaled(rows, weight, x.dtype)], scaled(x, weight, x.dtype))
    return sums


def _add(own: Sums, way: str, first: list[torch.Tensor], second: torch.Tensor) -> None:
    size = (first[0].shape[1], second.shape[1])
    for part in reversed(first):
        alone = own.setdefault((way, "products alone"), torch.zeros(size, dtype=torch.float64))
        alone.addmm_(part.double().T, second.double())
        if way != "fp64":
            own.setdefault((way, "fp32 sums"), torch.zeros(size)).addmm_(part.float().T, second.float())


def measured(model: Model) -> dict[str, list[Sums]]:
    """'moments' and 'misses' -> the relative errors of each sum."""
    errors: dict[str, list[Sums]] = {"moments": [], "misses": []}
    of_fp32_walk = summed(model, torch.float32, False)
    for place, own in summed(model, torch.bfloat16, True).items():
        exact = own.pop(("fp64", "products alone"))
        if place in of_fp32_walk and float(exact.norm()):
            found = {way: (total.double() - exact).norm() / exact.norm() for way, total in own.items()}
            off = (of_fp32_walk[place]["fp64", "products alone"] - exact).norm() / exact.norm()
            errors[place[0]].append(found | {(WALK, "products alone"): off, (WALK, "fp32 sums"): off})
    return errors


def kl_of(model: str, method: str, as_on_a_gpu: bool) -> float:
    device.CUDA_WAY_TOO = as_on_a_gpu
    with tempfile.TemporaryDirectory() as folder:
        texts = corpus.write_plain_texts(Path(folder))
        told = recipe(method, method, compute_dtype="bfloat16")
        record = quantize(model, Path(folder) / "out", told, Options("cpu", **texts), quiet=True)
        assert record.kl is not None
        return record.kl.kl_mean_nats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--kl", action="store_true", help="also quantize the model both ways")
    given = parser.parse_args()
    logging.set_verbosity_error()
    errors = measured(open_model(given.model))
    print("| | sum | products alone: mean | largest | with fp32 sums: mean | largest |\n" + "|---" * 6 + "|")
    for what, found in errors.items():
        for way in (*WAYS, ROOTS, WALK):
            cells = []
            for summed in ("products alone", "fp32 sums"):
                values = [float(own[way, summed]) for own in found]
                cells += [f"{statistics.mean(values):.1e}", f"{max(values):.1e}"]
            print(f"| {way} | {what} | {' | '.join(cells)} |")
    if given.kl:
        print("\n| mean KL in bf16 | a CPU's arithmetic | a GPU's |\n|---|---|---|")
        for method in ("fast", "balanced"):
            kls = [f"{kl_of(given.model, method, forced):.5f}" for forced in (False, True)]
            print(f"| `{method}` | {' | '.join(kls)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
