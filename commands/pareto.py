"""`onecard pareto`: the best predicted KL for each size, from prices that are measured once."""

from pathlib import Path

import click

from .options import budget_option, device_option, model_argument, recipe_option, texts_option
from .shared import make_console, print_json, verb

PRICES_HELP = "File of measured prices. Read if it exists, else measured and written."


@click.command()
@model_argument()
@recipe_option(required=True)
@click.option("--prices", type=click.Path(path_type=Path), help=PRICES_HELP)
@budget_option("Mark the best choice within this many GB.")
@texts_option("calibration")
@device_option()
@verb
def pareto(
    model: str, recipe: str, prices: Path | None, budget_gb: float | None, calibration: Path | None, device: str
) -> None:
    """Draw predicted KL against bytes for MODEL: the best widths for each size, uniform widths and rules of thumb.

    A unit is what an engine fuses: the experts of a layer, q/k/v, ... One pass over the model rounds each unit alone to
    each width, and measures the KL at the head. `quantize --prices FILE` uses the same prices for `bits: fit`.

    \b
    Example:
      onecard pareto demo --recipe demo-fit --prices prices.json
      onecard quantize demo demo-fit --recipe demo-fit --prices prices.json --budget-gb 0.006
    """
    from ..bits.pareto import pareto as run
    from ..recipe import load_recipe
    from ..report.pareto_card import draw_pareto

    loaded = load_recipe(recipe)
    if budget_gb is not None:
        loaded = loaded.within(budget_gb)
    console = make_console()
    facts = run(model, loaded, prices_file=prices, calibration=calibration, device_name=device, console=console).facts()
    draw_pareto(facts, console)
    print_json(facts)
