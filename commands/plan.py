"""`onecard plan`: whether a model fits a card, and what quantizing emits and costs. It reads no weights."""

from dataclasses import replace

import click

from .options import Between, device_option, gpu_option, model_argument, recipe_option
from .shared import make_console, print_json, verb

GPU_HELP = "The card, e.g. h100-80gb, or several of one kind, e.g. 2xl40s. Without it, a table of all cards."
KV_HELP = "Data type of the KV cache; q8_0 is for llama.cpp. [default: bf16]"
BATCH_HELP = "Prompt tokens in one forward pass (vLLM's --max-num-batched-tokens). [default: the engine's]"
ASSUME_HELP = "Estimate time and memory for a machine with this card, from rates that are assumed of it."
# The keys of core/card_rates.ASSUMED, without importing torch.
ASSUMED = ("h100-80gb",)
LOCAL_HELP = "Cache every token in sliding and chunked layers too, as vLLM does without its hybrid KV cache manager."
SHARE_HELP = "Share of the card's memory that the engine may use. [default: vllm 0.9, others 1]"


@click.command()
@model_argument()
@recipe_option(more="[default: the shipped recipe that keeps most and still fits]")
@gpu_option(GPU_HELP)
@click.option("--context", type=click.IntRange(1), help="Tokens per sequence. [default: the recipe's, or 32768]")
@click.option("--sequences", type=click.IntRange(1), help="Concurrent sequences. [default: the recipe's, or 1]")
@click.option("--kv-dtype", type=click.Choice(["bf16", "fp8", "q8_0"]), help=KV_HELP)
@click.option("--engine", type=click.Choice(["vllm", "transformers", "llama.cpp"]), help="[default: vllm]")
@click.option("--tensor-parallel", type=click.IntRange(1), help="Cards that share the model. [default: those of --gpu]")
@click.option("--no-vision", is_flag=True, help="Plan without the vision tower.")
@click.option("--images", default=0, show_default=True, type=click.IntRange(0), help="Images per request.")
@click.option("--batch-tokens", type=click.IntRange(16), help=BATCH_HELP)
@click.option("--memory-share", type=Between(0, 1, min_open=True), help=SHARE_HELP)
@click.option("--keep-local", is_flag=True, help=LOCAL_HELP)
@click.option("--plot", is_flag=True, help="Draw memory against context for each recipe.")
@click.option("--tensors", is_flag=True, help="List every tensor that the recipe will emit.")
@click.option(
    "--measure", is_flag=True, help="Measure this machine's rates for half a minute, and keep them for later plans."
)
@click.option("--assume", type=click.Choice(ASSUMED), help=ASSUME_HELP)
@click.option("--json", "only_json", is_flag=True, help="Print the JSON line only, without the card.")
@device_option("Device that would quantize:")
@verb
def plan(
    model: str,
    recipe: str | None,
    gpu: str | None,
    context: int | None,
    sequences: int | None,
    kv_dtype: str | None,
    engine: str | None,
    tensor_parallel: int | None,
    no_vision: bool,
    images: int,
    batch_tokens: int | None,
    memory_share: float | None,
    keep_local: bool,
    plot: bool,
    tensors: bool,
    measure: bool,
    assume: str | None,
    only_json: bool,
    device: str,
) -> None:
    """Say whether MODEL fits a card with the context that you need, and what would make it fit; reads no weights.

    MODEL is a finished checkpoint, or an original, for which the output of recipes is planned. --recipe adds what
    quantizing emits, to the byte, and what it takes. Exit code 3: it does not fit.

    \b
    Examples:
      onecard plan ./Llama-4-Scout-17B-16E-Instruct --gpu h100-80gb --context 131072 --sequences 4 --kv-dtype fp8
      onecard plan ./scout-int4 --gpu 2xl40s --plot
      onecard plan ./Llama-4-Scout-17B-16E-Instruct --recipe llama4-scout-h100 --tensors
    """
    from ..core.errors import FitError, InputError
    from ..forecast import CardWish, plan_on_card
    from ..recipe import load_recipe
    from ..report.fit_card import draw_fit, misfit
    from ..report.plan_card import draw_plan
    from ..report.plot import draw_plot

    if tensors and recipe is None:
        raise InputError("--tensors lists what a recipe will emit: give --recipe as well")
    if measure and recipe is None:
        raise InputError("--measure measures what a recipe will do here: give --recipe as well")
    if assume is not None and (recipe is None or measure):
        raise InputError("--assume says what a recipe takes on another machine: give --recipe, and no --measure")
    loaded = load_recipe(recipe) if recipe is not None else None
    if plot and gpu is None and (loaded is None or loaded.card.gpu is None):
        raise InputError("--plot draws memory against a card's: give --gpu as well")
    wish = CardWish(
        gpu=gpu,
        context=context,
        sequences=sequences,
        kv_dtype=kv_dtype,
        engine=engine,
        tensor_parallel=tensor_parallel,
        vision=not no_vision,
        images=images,
        batch_tokens=batch_tokens,
        memory_share=memory_share,
        keep_local=keep_local,
    )
    console = make_console()
    found = plan_on_card(model, loaded, wish, device, measure, assume)
    facts = found.sizing.facts()
    if not only_json:
        if found.quantizing is not None:
            # The fit card below prints its own warnings: do not print them twice.
            own = [warning for warning in found.quantizing.warnings if warning not in facts["fit_warnings"]]
            draw_plan(replace(found.quantizing, warnings=own), tensors, console)
        draw_fit(facts, console)
        if plot:
            draw_plot(facts, console)
    print_json(found.line())
    if found.fits is False:
        raise FitError(misfit(facts))
