"""Arguments and options that several verbs share, with what the shell completes for them.

A value that can be judged without torch is refused before torch is loaded (`refuse`, called by shared.verb).
Completing never loads torch.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..conversion.names import FORMAT_NAMES, refuse_unknown_format
from ..core.file_names import RECORD_NAME
from ..core.shipped_recipes import recipe_names, recipe_text
from ..models.known import refuse_unusable
from ..planner.cards import CARDS, find_card

Decorator = Callable[[Any], Any]

RECIPE_HELP = "A shipped recipe (see `onecard recipes`) or the path of a .yaml file."
DEVICE_HELP = "cpu, cuda, or auto: a GPU if there is one."
DATE_HELP = (
    "What a chat template that asks for today's date is told. [default: the date in CHECKPOINT's own record, or today]"
)
TEXTS_HELP = "JSONL, Parquet, plain text, or a folder of them"
YAML = (".yaml", ".yml")


class Refusable(click.ParamType):
    """A value of a verb that can be refused before anything heavy is imported."""

    def refuse(self, value: str) -> None:
        """Raises InputError for a value that cannot be used."""


class ModelName(Refusable):
    """A local folder, a hub id, or `demo`."""

    name = "model"

    def refuse(self, value: str) -> None:
        refuse_unusable(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        plain = [CompletionItem("demo")] if incomplete and "demo".startswith(incomplete) else []
        return [CompletionItem(incomplete, type="dir"), *plain]


class ModelOrRun(ModelName):
    """A model, or the folder of a finished run, of which the record is enough."""

    def refuse(self, value: str) -> None:
        if not (Path(value) / RECORD_NAME).is_file():
            super().refuse(value)


class RecipeName(Refusable):
    """A shipped recipe or a YAML file."""

    name = "recipe"

    def refuse(self, value: str) -> None:
        recipe_text(value)  # a name that does not exist is told before pydantic is loaded
        from ..recipe import load_recipe

        load_recipe(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        folder, _, begun = incomplete.rpartition("/")
        beside = Path(f"{folder}/" if "/" in incomplete else ".").expanduser()
        prefix = f"{folder}/" if "/" in incomplete else ""
        try:
            files = sorted(
                path.name for path in beside.iterdir() if path.suffix in YAML and path.name.startswith(begun)
            )
        except OSError:
            files = []
        shipped = [name for name in recipe_names() if name.startswith(incomplete)]
        found = [*shipped, *(prefix + name for name in files)]
        # Where neither matches, the shell's own completion leads through the folders.
        return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]


def _yaml_files(incomplete: str) -> list[str]:
    """YAML files whose path begins so, spelled as the user has begun it."""
    folder, slash, begun = incomplete.rpartition("/")
    try:
        names = sorted(path.name for path in Path(folder + slash or ".").expanduser().iterdir() if path.suffix in YAML)
    except OSError:
        return []
    return [folder + slash + name for name in names if name.startswith(begun)]


class CardName(Refusable):
    """A card of planner/cards.py, or several of one kind: 2xl40s."""

    name = "card"

    def refuse(self, value: str) -> None:
        find_card(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        count, times, begun = incomplete.lower().partition("x")
        many = f"{count}x" if times and count.isdigit() else ""
        begun = begun if many else incomplete.lower()
        return [CompletionItem(many + card.key, help=card.name) for card in CARDS if card.key.startswith(begun)]


class FormatName(Refusable):
    """A format of `onecard export`."""

    name = "format"

    def refuse(self, value: str) -> None:
        refuse_unknown_format(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in FORMAT_NAMES if name.startswith(incomplete)]


class DeviceName(click.ParamType):
    """cpu, cuda, cuda:1, ...: torch says later whether it is there."""

    name = "device"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in ("auto", "cpu", "cuda") if name.startswith(incomplete)]


def model_argument(name: str = "model", default: str | None = None) -> Decorator:
    """A model or checkpoint that is read from its folder or from the hub."""
    if default is None:
        return click.argument(name, type=ModelName())
    return click.argument(name, type=ModelName(), default=default)


def without_adapter_option() -> Decorator:
    return click.option(
        "--without-adapter", is_flag=True, help="Take the weights alone where an adapter is beside them."
    )


def recipe_option(required: bool = False, more: str = "") -> Decorator:
    """--recipe; `more` follows its help text."""
    return click.option("--recipe", type=RecipeName(), required=required, help=f"{RECIPE_HELP} {more}".strip())


def date_option() -> Decorator:
    """--date: the day that is pinned for the chat template."""
    return click.option("--date", type=click.DateTime(["%Y-%m-%d"]), metavar="YYYY-MM-DD", help=DATE_HELP)


def dated(recipe: Any, date: Any) -> Any:
    """The recipe with the date that the user named, if any."""
    return recipe if date is None else recipe.changed(template_date=date.date())


def device_option(before: str = "") -> Decorator:
    """--device; `before` begins its help text."""
    return click.option(
        "--device", type=DeviceName(), default="auto", show_default=True, help=f"{before} {DEVICE_HELP}".strip()
    )


def gpu_option(told: str) -> Decorator:
    """--gpu."""
    return click.option("--gpu", type=CardName(), help=told)


class Between(click.FloatRange):
    """A finite number between two ends. click's own range lets NaN through, which is neither below nor above."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        number = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number", param, context)
        return float(number)


def texts_option(which: str) -> Decorator:
    """--calibration or --evaluation: the user's own texts."""
    told = f"Your own {which} texts in place of the recipe's: {TEXTS_HELP}."
    return click.option(f"--{which}", type=click.Path(path_type=Path), help=told)


def budget_option(told: str) -> Decorator:
    """--budget-gb."""
    return click.option("--budget-gb", type=Between(0, min_open=True), help=told)


def refuse_early(context: click.Context) -> None:
    """Raises InputError for the first value of a verb that can be refused without torch."""
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if isinstance(parameter.type, Refusable) and isinstance(value, str):
            parameter.type.refuse(value)
