"""`bits: fit` beside uniform widths and the rule of thumb, at four budgets; predicted KL beside verified.

    python benchmarks/fit.py --model demo --method fast
    python benchmarks/fit.py --model build/peers/models/qwen3-moe --method fast  # peers/qwen3_moe.py trains it

All linear weights of the text blocks. Budgets lie a fifth, two, three and four fifths of the way from the bytes of all
int4 group 128 to those of all int8 group 128. The rule of thumb spends on int8 attention first, then on int8 shared
experts, as far as the budget goes; the rest is int4 group 128. A second version takes the smallest groups that fit.
Checkpoints are kept in build/fit and not made again. Neither prices nor calibration read the evaluation rows.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging

from onecard.bits.pareto import pareto
from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.model import open_source
from onecard.pipeline import Options, quantize
from onecard.recipe import Recipe, load_recipe

SHARES = (0.2, 0.4, 0.6, 0.8)
INT8 = "int8 group 128"
# The order in which the rule of thumb spends.
FIRST = ("attention", "shared_expert")
GROUPS = (128, 64, 32)


def base(method: str) -> Recipe:
    """The embedded model's fit recipe without its family, and with the given method."""
    fields = load_recipe("demo-fit").model_dump(exclude_unset=True) | {"family": None, "budget_gb": 0.005}
    kept = {
        key: fields[key]
        for key in (
            "name",
            "description",
            "bits",
            "budget_gb",
            "quantize_roles",
            "calibration",
            "calibration_rows",
            "calibration_row_tokens",
            "evaluation",
            "evaluation_rows",
            "evaluation_row_tokens",
            "price_rows",
        )
    }
    return Recipe.model_validate(kept | {"method": method})


def rules(recipe: Recipe) -> dict[str, Recipe]:
    """Uniform widths and rules of thumb, by name."""
    found = {f"all int4 group {g}": recipe.changed(bits=4, group_size=g, budget_gb=None) for g in GROUPS}
    for count in (1, 2):
        schemes = dict.fromkeys(FIRST[:count], INT8)
        for group in GROUPS:
            name = f"{' and '.join(FIRST[:count])} int8, rest int4 group {group}"
            found[name] = recipe.changed(bits=4, group_size=group, budget_gb=None, schemes=schemes)
    return found


def main() -> int:
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", default="fast", choices=["rtn", "fast", "balanced", "best"])
    parser.add_argument("--out", type=Path, default=Path("build/fit"))
    arguments = parser.parse_args()
    folder = arguments.out / f"{Path(arguments.model).name}-{arguments.method}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe, model = base(arguments.method), open_source(arguments.model)
    # `fast` takes fewer calibration rows, so its prices differ.
    prices = arguments.out / f"{Path(arguments.model).name}-{arguments.method}-prices.json"
    pareto(arguments.model, recipe, prices_file=prices, quiet=True, device_name="cpu")

    def made(name: str, asked: Recipe) -> dict[str, Any]:
        out = folder / name.replace(" ", "-").replace(",", "")
        if not (out / "config.json").exists():
            use = prices if asked.bits == "fit" else None
            quantize(arguments.model, out, asked, Options("cpu", overwrite=True, prices=use), quiet=True)
        record = json.loads((out / "onecard.json").read_text())
        found = {"name": name, "bytes": record["plan"]["emitted_bytes"], "kl": record["kl"]["kl_mean_nats"]}
        print(f"{name}: {found['bytes']:,} bytes, {found['kl']:.6f}", file=sys.stderr, flush=True)
        return found | {"predicted": record.get("allocation", {}).get("predicted_kl_nats")}

    least, most = (plan_for(model, recipe.changed(bits=bits, budget_gb=None)).emitted_bytes for bits in (4, 8))
    others = {name: (plan_for(model, asked).emitted_bytes, asked) for name, asked in rules(recipe).items()}
    print(
        "| budget, bytes | fit: bytes | verified KL | predicted | predicted / verified | best uniform | ratio "
        "| rule of thumb | ratio | rule with smaller groups | ratio |"
    )
    print("|" + "---|" * 11)
    worst = 0.0
    for share in SHARES:
        budget = int(least + share * (most - least))
        fitted = made(f"fit {share:.0%}", recipe.changed(budget_gb=budget / 1e9))
        within = {name: asked for name, (size, asked) in others.items() if size <= budget}
        uniform = min((made(n, a) for n, a in within.items() if n.startswith("all")), key=lambda found: found["kl"])
        rule = made(*next((n, a) for n, a in reversed(within.items()) if n.endswith("128") and not n.startswith("all")))
        finer = made(*next((n, a) for n, a in reversed(within.items()) if not n.startswith("all")))
        ratios = [fitted["kl"] / other["kl"] for other in (uniform, rule, finer)]
        off = fitted["predicted"] / fitted["kl"]
        worst = max(worst, *ratios[:2])
        print(
            f"| {budget:,} | {fitted['bytes']:,} | {fitted['kl']:.6f} | {fitted['predicted']:.6f} | {off:.2f} | "
            + " | ".join(
                f"{o['name']}: {o['kl']:.6f} | {r:.3f}" for o, r in zip((uniform, rule, finer), ratios, strict=True)
            )
            + " |",
            flush=True,
        )
    print(f"\nworst ratio {worst:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
