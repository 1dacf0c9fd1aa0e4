"""The verb `calibration show`: example rows of a recipe's calibration texts, as the model will read them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..checkpoint.model import open_model
from ..core.rows import Row
from ..recipe import Recipe
from ..report.shown import ShownRow, draw_rows, draw_texts
from .texts import RunTexts, prepare_texts
from .tokens import Encoder


@dataclass(frozen=True)
class ExampleRows:
    """The rows to show, and all the texts that they were taken from."""

    texts: RunTexts
    rows: list[ShownRow]
    encoder: Encoder

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        return self.texts.facts["calibration"]

    def draw(self, whole: bool, console: Console) -> None:
        """Prints the rows, what all texts are made of, and warnings. `whole`: long rows are not shortened."""
        tokenizer = self.encoder.tokenizer
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        draw_rows(self.rows, special, lambda ids: str(tokenizer.decode(ids)), whole, console)
        console.rule()
        draw_texts(self.texts.facts["calibration"], console)
        if self.texts.is_pool:
            console.print(Text(f"a pool: the run will choose {sum(self.texts.wanted.values()):,} of these rows"))
        for warning in self.texts.warnings:
            console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def _spread(rows: list[Row], count: int) -> list[int]:
    """Numbers of `count` rows, evenly spread; a long row and a row with pictures are among them if there are any."""
    chosen = {i * len(rows) // count for i in range(min(count, len(rows)))}
    longest = max(range(len(rows)), key=lambda i: len(rows[i].tokens))
    special = [longest] if len(rows[longest].tokens) > len(rows[0].tokens) else []
    special += [i for i, row in enumerate(rows) if row.pixels is not None][:1]
    wanted = [i for i in special if i not in chosen][: max(0, count - 1)]
    return sorted([*sorted(chosen)[: count - len(wanted)], *wanted])


def example_rows(
    model_name: str, recipe: Recipe, count: int, calibration: Path | None = None, evaluation: Path | None = None
) -> ExampleRows:
    """`count` calibration rows of the recipe, or of the user's own texts. Reads no weights. Raises InputError."""
    model = open_model(model_name)
    texts = prepare_texts(model, recipe, calibration, evaluation, needs_calibration=True)
    shown = []
    for number in _spread(texts.calibration, count):
        row = texts.calibration[number]
        parts = [(part.document, part.kind, part.source, part.tokens) for part in row.parts]
        images = 0 if row.pixels is None else len(row.pixels)
        shown.append(ShownRow(number, row.tokens.tolist(), images, parts))
    return ExampleRows(texts, shown, Encoder(model.path, model.adapter))
