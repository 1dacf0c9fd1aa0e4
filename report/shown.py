"""Sample rows as the model sees them: special tokens visible, runs of one token collapsed, nothing else changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from ..core.units import counted

# A long row is cut to this many tokens of its head and of its end.
HEAD_TOKENS, TAIL_TOKENS = 420, 120
# A longer run of one special token is shown once, with its length.
LONGEST_RUN = 1


@dataclass(frozen=True)
class ShownRow:
    """A row and its parts: (document, kind, source, tokens) of each."""

    number: int
    tokens: Sequence[int]
    images: int
    parts: Sequence[tuple[str, str, str, int]]


def readable(text: str) -> str:
    """Text without control characters, which could steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def spelled(tokens: Sequence[int], special: set[int], decode: Callable[[list[int]], str]) -> list[tuple[str, bool]]:
    """Pieces of (text, whether it is a special token); a run of one special token becomes `<|patch|> x 144`."""
    out: list[tuple[str, bool]] = []
    for key, group in groupby(tokens, key=lambda token: token if token in special else -1):
        run = list(group)
        if key == -1:
            out.append((readable(decode(run)), False))
        else:
            name = readable(decode(run[:1]))
            out += [(f"{name} x {len(run)}", True)] if len(run) > LONGEST_RUN else [(name, True)]
    return out


def draw_rows(
    rows: Sequence[ShownRow], special: set[int], decode: Callable[[list[int]], str], whole: bool, console: Console
) -> None:
    for row in rows:
        pictures = f", {counted(row.images, 'image')}" if row.images else ""
        console.rule(
            Text(f"row {row.number}: {counted(len(row.tokens), 'token')}{pictures}", style="bold"), align="left"
        )
        for document, kind, source, tokens in row.parts:
            console.print(Text(readable(f"  {tokens:>6,} tokens of {document} ({kind}, {source})"), style="dim"))
        long = len(row.tokens) > HEAD_TOKENS + TAIL_TOKENS and not whole
        pieces = spelled(row.tokens[:HEAD_TOKENS] if long else row.tokens, special, decode)
        if long:
            pieces.append((f"\n... {len(row.tokens) - HEAD_TOKENS - TAIL_TOKENS:,} tokens ...\n", False))
            pieces += spelled(row.tokens[-TAIL_TOKENS:], special, decode)
        text = Text()
        for words, is_special in pieces:
            text.append(words, "bold magenta" if is_special else "")
        console.print(text, soft_wrap=True)


def draw_texts(facts: dict[str, Any], console: Console) -> None:
    """Print what the rows hold, by kind and by source."""
    total = max(1, facts["tokens"])
    long = f", {facts['long_rows']:,} of them with {facts['longest_row_tokens']:,}" if facts["long_rows"] else ""
    console.print(
        Text(
            f"{counted(facts['rows'], 'row')}, {facts['tokens']:,} of {facts['tokens_given']:,} tokens{long}; "
            f"{facts['rows_with_images']:,} with images"
        )
    )
    for which in ("kind", "source"):
        shares = [f"{name} {n:,} ({n / total:.1%})" for name, n in facts[f"tokens_by_{which}"].items()]
        console.print(Text(readable(f"by {which}: {', '.join(shares)}")))
