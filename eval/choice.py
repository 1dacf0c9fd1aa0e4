"""The likelihood of options under both models, in one twin walk: it answers multiple-choice items.

A row holds a context and all but the last token of a continuation, and is asked for the continuation's tokens. So
options of one token, as A to D, share one row. Rows are padded at the end to a multiple of a few tokens, so that rows
share batches: attention is causal, and padding cannot change what is asked before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.errors import InputError
from ..core.rows import Row
from .kl import TokenResults
from .twin import Asked

# Rows are padded to a multiple of this many tokens.
LENGTHS = 16


@dataclass(frozen=True)
class OptionRequest:
    """Asks how likely `continuation` is after `context`; token ids, neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """Log-likelihoods in nats, summed over the continuation, and whether each of its tokens is the likeliest."""

    logp_reference: float
    logp_quantized: float
    greedy_reference: bool
    greedy_quantized: bool


@dataclass(frozen=True)
class Asking:
    """Requests as rows for a twin walk. `places[i]` for request i: (row, its first answer in that row, one past its
    last)."""

    asked: tuple[Asked, ...]
    places: tuple[tuple[int, int, int], ...]


def ask(requests: Sequence[OptionRequest]) -> Asking:
    """Rows for the requests; equal rows are shared. Raises InputError for an empty context or continuation."""
    rows: dict[tuple[int, ...], int] = {}
    questions: list[list[tuple[int, int]]] = []
    places = []
    for request in requests:
        if not request.context or not request.continuation:
            raise InputError("an item has an empty question or an empty option: mend the items")
        read = request.context + request.continuation[:-1]
        number = rows.setdefault(read, len(rows))
        if number == len(questions):
            questions.append([])
        start = len(questions[number])
        questions[number] += [(len(request.context) - 1 + i, token) for i, token in enumerate(request.continuation)]
        places.append((number, start, start + len(request.continuation)))
    asked = []
    for read, number in rows.items():
        filled = read + (read[-1],) * (-len(read) % LENGTHS)
        pairs = torch.tensor(questions[number])
        asked.append(Asked(Row(f"item-{number}", "item", torch.tensor(filled)), pairs[:, 0], pairs[:, 1]))
    return Asking(tuple(asked), tuple(places))


def scores(asking: Asking, answers: TokenResults) -> list[Scored]:
    """One entry per request, from the walk's answers."""
    # Sorted by row. The sort is stable, so a row's answers keep the order in which they were asked.
    order = answers.document.argsort(stable=True)
    targets = torch.cat([item.targets for item in asking.asked])
    first = torch.tensor([0, *(len(item.targets) for item in asking.asked)]).cumsum(0).tolist()
    sides = [
        (logp[order].double(), top[order, 0] == targets)
        for logp, top in (
            (answers.logp_reference, answers.top_reference),
            (answers.logp_quantized, answers.top_quantized),
        )
    ]
    found = []
    for row, start, stop in asking.places:
        part = slice(first[row] + start, first[row] + stop)
        (p, p_greedy), (q, q_greedy) = ((float(logp[part].sum()), bool(greedy[part].all())) for logp, greedy in sides)
        found.append(Scored(p, q, p_greedy, q_greedy))
    return found
