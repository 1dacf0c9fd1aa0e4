"""Draws a plan's use of a card's memory: the sum, the longest context, what would make it fit, the other cards.

The drawing uses only the facts (sizing.Sizing.facts), so a record that holds them gives the same picture. It is made
for 80 columns. Memory is in GiB, as drivers and engines count it; files are in GB, as hubs count them.
"""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..core.units import counted, size
from .card import labelled

GIB = 2**30
ENGINES = {"vllm": "vLLM", "transformers": "transformers", "llama.cpp": "llama.cpp"}
# The parts of a card's memory: name, key in the facts, colour, and the character that draws it.
PARTS = (
    ("weights", "weight_bytes", "blue", "█"),
    ("KV cache", "kv_bytes", "magenta", "▓"),
    ("workspace", "workspace_bytes", "cyan", "▒"),
)
BAR_CELLS = 56
# The fewest bits per weight that engines load: int4 with one bf16 scale for every 128 weights.
LEAST_BITS = 4.125


def gib(count: float, digits: int = 1) -> str:
    return f"{count / GIB:,.{digits}f} GiB"


def short(count: int) -> str:
    """A token count for a narrow column: 131k, 1.2M."""
    if count >= 10_000_000:
        return f"{count / 1e6:.0f}M"
    if count >= 1_000_000:
        return f"{count / 1e6:.1f}M"
    return f"{count // 1000}k" if count >= 10_000 else f"{count:,}"


def on_cards(facts: Mapping[str, Any]) -> str:
    """The plan's cards in words: 'H100 80 GB', '2 x L40S 48 GB'."""
    name = next(entry["name"] for entry in facts["table"] if entry["gpu"] == facts["gpu"])
    return f"{facts['cards']} x {name}" if facts["cards"] > 1 else str(name)


def asked(facts: Mapping[str, Any]) -> str:
    """The load that the plan was made for: sequences, context, cache type, engine, images."""
    tower = ", no vision tower" if not facts["vision"] else ""
    images = f", {counted(facts['images'], 'image')} a request" if facts["images"] else ""
    return (
        f"{counted(facts['sequences'], 'sequence')} of {facts['context']:,} tokens, {facts['kv_dtype']} KV cache, "
        f"{ENGINES[facts['engine']]}{tower}{images}"
    )


def reach(facts: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The longest context and the most sequences that fit, in words. `row` holds both limits."""
    if facts["weight_bytes"] > facts["usable_bytes"]:
        return "not one token: the weights alone are more than the card has"
    own = " (the model's own limit)" if row["max_context"] >= facts["model_max_context"] else ""
    longest = f"{row['max_context']:,} tokens{own}" if row["max_context"] else "not one token"
    most = counted(row["max_sequences"], "sequence") if row["max_sequences"] else "not one sequence"
    return f"{longest} for {counted(facts['sequences'], 'sequence')}; {most} of {facts['context']:,}"


def misfit(facts: Mapping[str, Any]) -> str:
    """One line: how much memory is missing, and the least change that makes the model fit."""
    if facts["candidate"] and facts["changes"]:
        way = ", ".join(facts["changes"][0]["steps"])
        out = f"The least change that does: {way}"
    elif facts["max_context"]:
        out = f"It fits with {facts['max_context']:,} tokens of context"
    elif facts["cards_needed"]:
        out = f"It takes {facts['cards_needed']} such cards"
    else:
        out = "Nothing that is shipped would fit; see the table of cards"
    what = facts["model"] if facts["candidate"] == "as it is" else f"{facts['model']} by {facts['candidate']}"
    return f"{what} does not fit: {gib(-facts['left_bytes'])} too much for {on_cards(facts)}. {out}"


def bar(facts: Mapping[str, Any], cells: int = BAR_CELLS) -> Text:
    """The card's memory as one line: its parts, then what is left. If they do not fit, a mark shows the card's end."""
    whole = max(facts["usable_bytes"], sum(facts[key] for _, key, _, _ in PARTS))
    line, drawn, total = Text(), 0, 0
    for _, key, colour, sign in PARTS:
        total += facts[key]
        end = max(round(cells * total / whole), drawn + (1 if facts[key] else 0))
        line.append(sign * (end - drawn), style=colour)
        drawn = end
    line.append("·" * (cells - drawn), style="dim")
    if facts["left_bytes"] < 0:
        edge = min(cells - 1, round(cells * facts["usable_bytes"] / whole))
        line = Text.assemble(line[:edge], ("┃", "bold red"), line[edge + 1 :])
    return line


def draw_fit(facts: Mapping[str, Any], console: Console) -> None:
    """Prints the card. `facts` is the result of sizing.Sizing.facts()."""
    parts: list[Any] = [_head(facts)]
    if len(facts["candidates"]) > 1:
        parts.append(_candidates(facts))
    if facts["fits"] is False:
        parts.append(_ways_out(facts))
    parts.append(_cards(facts))
    notes = labelled()
    notes.add_row("", "")
    for warning in facts["fit_warnings"]:
        notes.add_row("warning", Text(warning, style="yellow"))
    if facts["fit_warnings"]:
        parts.append(notes)
    console.print(Panel(Group(*parts), title="onecard plan: memory", box=box.ROUNDED, expand=False))


def _head(facts: Mapping[str, Any]) -> Table:
    grid = labelled()
    grid.add_row("model", Text(f"{facts['model']} ({facts['family']})"))
    grid.add_row("asked", asked(facts))
    grid.add_row("KV cache", _cache(facts))
    if facts["gpu"] is None:
        return grid
    each = " on each card" if facts["cards"] > 1 else ""
    source = next(entry["source"] for entry in facts["table"] if entry["gpu"] == facts["gpu"])
    share = f"{ENGINES[facts['engine']]} takes {facts['memory_share']:g} of it: {gib(facts['usable_bytes'])}"
    grid.add_row("card", f"{on_cards(facts)}: {source}; {share}{each}")
    grid.add_row("with", Text(facts["candidate"]))
    grid.add_row("", bar(facts))
    for name, key, colour, sign in PARTS:
        more = {"weight_bytes": f"{size(facts[key])}, exact", "kv_bytes": "exact"}.get(key, "an estimate")
        if key == "kv_bytes" and facts["kv"]["in_flight_bytes"]:
            more += f"; {gib(facts['kv']['in_flight_bytes'], 2)} of it for prompts on their way"
        grid.add_row(Text(f"{sign} {name}", style=f"bold {colour}"), f"{gib(facts[key], 2)} ({more})")
    if facts["fits"]:
        grid.add_row("answer", Text(f"fits, {gib(facts['left_bytes'], 2)} left", style="bold green"))
    else:
        grid.add_row("answer", Text(f"does not fit: {gib(-facts['left_bytes'], 2)} too much", style="bold red"))
    grid.add_row("at most", reach(facts, facts))
    if facts["better"]:
        better = facts["better"]
        said = f"{better['candidate']} fits too with {', '.join(better['steps'])}: {gib(better['left_bytes'])} left"
        grid.add_row("better", Text(said))
    if facts["fits"] and facts["serve"]:
        grid.add_row("serve", Text(facts["serve"], overflow="fold"))
    return grid


def _cache(facts: Mapping[str, Any]) -> str:
    rate = f"{facts['kv_per_token_bytes'] / 1024:,.4g} KiB a token"
    if facts["kv_per_sequence_bytes"]:
        local = gib(facts["kv_per_sequence_bytes"], 3)
        local = f"up to {local} a sequence"
        rate = f"{rate} and {local}" if facts["kv_per_token_bytes"] else local
    return rate + (" on each card" if facts["cards"] > 1 else "")


def _listing(title: str, *columns: str) -> Table:
    """An empty table. A column whose name begins with `<` holds words and is aligned left; the others align right."""
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    for column in columns:
        words = column.startswith("<")
        table.add_column(column.removeprefix("<"), justify="left" if words else "right", no_wrap=True)
    return table


def letter(facts: Mapping[str, Any], name: str) -> str:
    """The letter that stands for a candidate in the table of cards."""
    return "abcdefghijklmnopqrstuvwxyz"[[c["name"] for c in facts["candidates"]].index(name) % 26]


def _most(count: int) -> str:
    return f"{count:,}" if count else "–"


def _left(row: Mapping[str, Any]) -> Text:
    return Text(f"{row['left_bytes'] / GIB:+,.1f}", style="green" if row["fits"] else "red")


def _candidates(facts: Mapping[str, Any]) -> Table:
    if facts["gpu"] is None:
        table = _listing("What could be put on a card (GiB)", "<", "<recipe", "weights")
        for row in facts["candidates"]:
            table.add_row(letter(facts, row["name"]), Text(row["name"]), f"{row['weight_bytes'] / GIB:,.1f}")
        return table
    title = f"Recipes on {on_cards(facts)} (GiB)"  # a title wider than the narrowest table would wrap
    table = _listing(title, "<", "<recipe", "weights", "left", "context", "sequences")
    for row in facts["candidates"]:
        style = "bold" if row["name"] == facts["candidate"] else ""
        start = (Text(letter(facts, row["name"]), style=style), Text(row["name"], style=style))
        if "fits" not in row:
            table.add_row(*start, f"{row['weight_bytes'] / GIB:,.1f}", "cannot be cut", "–", "–")
            continue
        longest = short(row["max_context"]) if row["max_context"] else "–"
        table.add_row(*start, f"{row['weight_bytes'] / GIB:,.1f}", _left(row), longest, _most(row["max_sequences"]))
    return table


def _ways_out(facts: Mapping[str, Any]) -> Table:
    grid = labelled()
    grid.title, grid.title_justify, grid.title_style = (
        "\nWhat would make it fit, the least change first",
        "left",
        "bold",
    )
    for i, change in enumerate(facts["changes"][:6], 1):
        grid.add_row(f"{i}", Text(f"{' + '.join(change['steps'])}: {gib(change['left_bytes'])} left"))
    if facts["max_context"]:
        grid.add_row("context", f"{facts['max_context']:,} tokens, with nothing else changed")
    if facts["max_sequences"]:
        grid.add_row("sequences", f"{facts['max_sequences']:,}, with nothing else changed")
    if facts["cards_needed"]:
        grid.add_row("cards", f"{facts['cards_needed']} such cards, with nothing else changed")
    else:
        grid.add_row("cards", "no number of these that the model can be cut over")
    bits = facts["bits_that_fit"]
    room = f"{bits:.2f} bits a weight" if bits > 0 else "no weights of its blocks"
    if bits < LEAST_BITS:
        said = f"there is room for {room}, and engines load {LEAST_BITS} or more: by bits alone none fit"
    else:
        said = f"there is room for {room} of its blocks' matrices, scales included"
    grid.add_row("bits", said)
    return grid


def _cards(facts: Mapping[str, Any]) -> Table:
    several = len(facts["candidates"]) > 1
    number = f"{facts['cards']} of each" if facts["cards"] > 1 else "one of each"
    columns = ["<card", "usable", *(["<with"] if several else []), "left", "context", "sequences"]
    title = f"Cards, {number} (GiB a card" + ("; with the largest that fits)" if several else ")")
    table = _listing(title, *columns)
    for row in facts["table"]:
        name = Text(row["name"], style="bold" if row["gpu"] == facts["gpu"] else "")
        usable = f"{row['all_usable_bytes'] / GIB:,.1f}"
        if row["candidate"] is None:
            needs = f"takes {row['cards_needed']}" if row["cards_needed"] else "too small"
            table.add_row(name, usable, *(["–"] if several else []), Text(needs, style="red"), "–", "–")
            continue
        chosen = [letter(facts, row["candidate"])] if several else []
        table.add_row(name, usable, *chosen, _left(row), short(row["max_context"]), _most(row["max_sequences"]))
    return table
