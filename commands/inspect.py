"""The verbs that show something: `onecard inspect`, `onecard generate` and `onecard recipes`."""

from pathlib import Path

import click

from .options import model_argument
from .shared import make_console, print_json, print_line, verb


@click.command()
@model_argument()
@verb
def inspect(model: str) -> None:
    """Show family, layers, experts, widths, sizes and config faults of MODEL, an original or a quantized checkpoint.

    \b
    Example:
      onecard inspect demo
    """
    from ..checkpoint.inspect import inspect as run
    from ..report.plan_card import draw_inspection

    facts = run(model)
    draw_inspection(facts, make_console())
    print_json(facts)


@click.command()
@model_argument("checkpoint")
@click.argument("prompt")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1), help="Length of the answer.")
@click.option("--image", type=click.Path(path_type=Path), help="A picture to ask about, if the model sees.")
@verb
def generate(checkpoint: str, prompt: str, max_new_tokens: int, image: Path | None) -> None:
    """Load CHECKPOINT with transformers and answer PROMPT: a smoke test that other programs can read the files.

    The whole dequantized model is loaded into memory.

    \b
    Example:
      onecard generate demo-int4 "What do you see?" --image picture.png
    """
    from ..eval.generate import generate as run

    print_line(run(checkpoint, prompt, max_new_tokens, image))


@click.command()
@click.argument("name", required=False)
@verb
def recipes(name: str | None) -> None:
    """List the shipped recipes, or print the one called NAME.

    \b
    Example, a recipe to start your own from:
      onecard recipes llama4-scout-h100 > mine.yaml
    """
    from ..core.shipped_recipes import recipe_names, recipe_text
    from ..recipe import load_recipe

    if name is not None:
        print_line(recipe_text(name).rstrip())
        return
    for known in recipe_names():
        recipe = load_recipe(known)
        print_line(f"{known}\n    {recipe.description}" + (f"\n    {recipe.note}" if recipe.note else ""))
