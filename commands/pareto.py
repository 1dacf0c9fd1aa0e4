"""`onecard pareto`: what each budget of bytes buys, from prices that are measured once."""

import json
from pathlib import Path

import click

from .shared import DEVICE_HELP, RECIPE_HELP, TEXTS_HELP, make_console, print_line, verb

PRICES_HELP = "Where the measured prices are kept: read if it is there, else written."


@click.command()
@click.argument("model")
@click.option("--recipe", required=True, help=RECIPE_HELP)
@click.option("--prices", type=click.Path(path_type=Path), help=PRICES_HELP)
@click.option("--budget-gb", type=click.FloatRange(0, min_open=True), help="Mark the best choice within so many GB.")
@click.option("--calibration", type=click.Path(path_type=Path), help=f"Your own calibration texts: {TEXTS_HELP}.")
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@verb
def pareto(
    model: str, recipe: str, prices: Path | None, budget_gb: float | None, calibration: Path | None, device: str
) -> None:
    """Draw predicted KL against bytes for MODEL: the best widths for every size, uniform ones and rules of thumb.

    Every unit (what an engine fuses: the experts of a layer, q/k/v, ...) is rounded alone to each width, and its KL
    measured at the head, in one pass over the model. `quantize --prices FILE` uses the same prices for `bits: fit`.

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
        loaded = loaded.changed(bits="fit", budget_gb=budget_gb, gpu=None)
    console = make_console()
    facts = run(model, loaded, prices_file=prices, calibration=calibration, device_name=device, console=console).facts()
    draw_pareto(facts, console)
    print_line(json.dumps(facts))
