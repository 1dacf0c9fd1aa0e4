"""What each part of the quantizer is worth: `python benchmarks/quantizers.py [MODEL] [--results FILE]`.

Every linear weight of the text blocks is int4 in groups of 128. All lines have the same scheme, bytes and calibration
rows (the embedded texts without pictures) and are judged on the choice set of benchmarks/peers/texts.py. The lines: the
methods; each part alone, added to plain GPTQ; each part left out of `balanced`; each part that only `best` has, added
to `balanced`. Prints mean KL with its 95 % interval, median, changed routes, seconds and the ratio to round-to-nearest.
A line that FILE already holds is not run again.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging

from onecard.core.method import PRESETS
from onecard.demo import corpus
from onecard.pipeline import Options, quantize
from onecard.recipe import Recipe

ROLES = ("expert", "shared_expert", "mlp", "attention")
# Plain GPTQ: absmax scales, columns in their order, statistics once for each half of a block, nothing else.
PLAIN: dict[str, Any] = {
    "activation_order": False,
    "scale_search": False,
    "signed_scales": False,
    "restarts": 0,
    "tabu_moves": 0,
    "refine_rounds": 0,
    "reference_correction": False,
    "aim_kept": False,
    "token_weighting": "none",
    "output_blocks": 0,
    "sequential": "halves",
}
# Part -> its fields in `balanced`; a part that builds on another has that one's fields, too.
PARTS: dict[str, tuple[str, ...]] = {
    "activation order": ("activation_order",),
    "scale search": ("scale_search",),
    "signed scales (with scale search)": ("signed_scales", "scale_search"),
    "refinement": ("refine_rounds",),
    "tabu search": ("tabu_moves",),
    "reference correction": ("reference_correction",),
    "routers aimed (with reference correction)": ("aim_kept", "reference_correction"),
    "tokens weighted by gradients": ("token_weighting",),
    "output metric": ("output_blocks",),
    "statistics site by site": ("sequential",),
}


def recipe(name: str, method: str, **fields: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": name,
            "description": "benchmark",
            "method": method,
            "quantize_roles": ROLES,
            "calibration_row_tokens": 512,
            "evaluation_row_tokens": 512,
            "evaluation_rows": 100_000,
            "warn_below_expert_rows": 0,
        }
        | fields
    )


def cases() -> dict[str, Recipe]:
    full = recipe("balanced", "balanced").model_dump()
    found = {method: recipe(method, method) for method in PRESETS}
    found["plain GPTQ"] = recipe("plain", "balanced", **PLAIN)
    for part, fields in PARTS.items():
        alone = PLAIN | {field: full[field] for field in fields}
        found[f"alone: {part}"] = recipe("alone", "balanced", **alone)
        found[f"left out: {part}"] = recipe("left-out", "balanced", **{fields[0]: PLAIN[fields[0]]})
    found["instead of gradients: tokens weighted by residual"] = recipe("other", "balanced", token_weighting="residual")
    for field, value in PRESETS["best"].items():
        if value != full[field]:
            found[f"added: {field} {value}"] = recipe("added", "balanced", **{field: value})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--results", type=Path, help="JSON lines, read and added to")
    parser.add_argument("--only", action="append", help="lines whose name begins with this")
    given = parser.parse_args()
    logging.set_verbosity_error()
    known: dict[str, dict[str, Any]] = {}
    if given.results and given.results.exists():
        known = {row["name"]: row for row in map(json.loads, given.results.read_text().splitlines())}
    print(
        "| | mean KL | 95 % interval | median | changed routes | seconds | of round-to-nearest |\n" + "|---" * 7 + "|"
    )
    base = 0.0
    with tempfile.TemporaryDirectory() as folder:
        texts = corpus.write_plain_texts(Path(folder))
        for number, (name, what) in enumerate(cases().items()):
            if given.only and not any(name.startswith(only) for only in given.only):
                continue
            if name not in known:
                out = Path(folder) / str(number)
                record = quantize(given.model, out, what, Options("cpu", **texts), quiet=True)
                known[name] = {"name": name, "seconds": record.machine["seconds"]} | record.kl
                if given.results:
                    with given.results.open("a") as file:
                        file.write(json.dumps(known[name]) + "\n")
            kl = known[name]
            base = base or kl["kl_mean_nats"]
            print(
                f"| {name} | {kl['kl_mean_nats']:.5f} | {kl['kl_low_nats']:.5f} to {kl['kl_high_nats']:.5f} "
                f"| {kl['kl_median_nats']:.5f} | {kl['changed_routes']:.2%} | {kl['seconds']:.0f} "
                f"| {kl['kl_mean_nats'] / base:.3f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
