"""Sections that a person reads: the worst tokens in their context, the worst documents, and answers that changed."""

from itertools import cycle

from ..reading import Record, Share, Task, WorstToken
from ..shown import readable
from . import figures
from .parts import Choice, Figure, Passage, Section, Table, between, nats, percent, short, table

WORST_DOCUMENTS = 12
# So many of the worst tokens stand open; the others fold away.
OPEN_TOKENS = 6
# Of a task no more changed answers are listed: they make a page long and nobody reads thousands.
MOST_ANSWERS = 200
PAINTS = ("accent", "orange", "teal", "violet", "muted")


def tokens_section(record: Record) -> list[Section]:
    found = record.kl.worst_tokens if record.kl else ()
    if not found:
        return []
    passages = tuple(map(_passage, found))
    lede = (
        f"The {len(found)} tokens on which the two models differ most, in their context. Orange: what the text "
        "says. Bars: what either model would have said."
    )
    return [
        Section(
            "tokens", "The worst tokens", lede, passages=passages[:OPEN_TOKENS], more_passages=passages[OPEN_TOKENS:]
        )
    ]


def _passage(token: WorstToken) -> Passage:
    facts = [f"document {token.document}", *([token.kind] if token.kind else []), f"position {token.position:,}"]
    if token.p_reference is not None and token.p_quantized is not None:
        facts.append(f"its probability: {percent(token.p_reference)} to {percent(token.p_quantized)}")
    return Passage(
        f"{nats(token.kl_nats)} nats",
        readable(", ".join(facts)),
        readable(token.before),
        visible(token.token),
        readable(token.after),
        tuple(Choice(visible(text), p, text == token.token) for text, p in token.reference_top),
        tuple(Choice(visible(text), p, text == token.token) for text, p in token.quantized_top),
    )


def visible(text: str) -> str:
    """A token that is only white space is seen too."""
    plain = readable(text)
    return plain if plain.strip() else plain.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")


def documents_section(record: Record) -> list[Section]:
    documents = record.kl.by_document if record.kl else ()
    if not documents:
        return []
    worst = sorted(documents, key=lambda d: -d.kl_mean_nats)
    columns = (
        "document",
        ">mean KL",
        ">same top-1",
        ">tokens",
        "kind",
        ">nats, original",
        ">nats, quantized",
        "source",
        "digest",
    )
    rows = [
        (
            d.document,
            nats(d.kl_mean_nats),
            percent(d.same_top1),
            f"{d.tokens:,}",
            d.kind,
            nats(d.nll_reference),
            nats(d.nll_quantized),
            d.source,
            short(d.digest),
        )
        for d in worst
    ]
    lede = (
        f"{len(documents):,} documents. The worst has a mean KL of {nats(worst[0].kl_mean_nats)} nats, the best "
        f"{nats(worst[-1].kl_mean_nats)}."
    )
    top = table("The worst documents", columns[:-2], [row[:-2] for row in rows[:WORST_DOCUMENTS]])
    hard = [d for d in documents if d.nll_reference is not None and d.kl_mean_nats > 0]
    every = table("Every document, the worst first", columns, rows)
    if not hard:
        return [Section("documents", "The worst documents", lede, tables=(top,), folded=(every,))]
    kinds = list(dict.fromkeys(d.kind or "text" for d in hard))
    series = [
        (
            kind,
            paint,
            [
                (d.nll_reference or 0.0, d.kl_mean_nats, f"document {d.document}: {nats(d.kl_mean_nats)}")
                for d in hard
                if (d.kind or "text") == kind
            ],
        )
        for kind, paint in zip(kinds, cycle(PAINTS), strict=False)
    ]
    figure = Figure(
        "Every document",
        figures.cloud(series, "how hard the text is: nats a token of the original", "mean KL, nats a token"),
        (every,),
    )
    return [Section("documents", "The worst documents", lede, (figure,), (top,))]


def flips_section(record: Record) -> list[Section]:
    flips = record.flips
    if flips is None:
        return []
    tasks = flips.tasks or (flips.all,)
    every = [*tasks, flips.all] if len(tasks) > 1 else list(tasks)
    columns = (
        "task",
        ">items",
        ">original right",
        ">quantized right",
        ">answers changed",
        ">right to wrong",
        ">wrong to right",
        ">McNemar's p",
    )
    rows = [
        (
            _name(task, flips.all),
            f"{task.items:,}",
            _share(task.accuracy_reference),
            _share(task.accuracy_quantized),
            _share(task.changed),
            _share(task.right_to_wrong),
            _share(task.wrong_to_right),
            _p(task.mcnemar_p),
        )
        for task in every
    ]
    summary = table(
        "Flips by task",
        columns,
        rows,
        "Shares with Wilson's 95 % intervals. McNemar's exact test asks whether right to wrong and wrong to "
        "right differ by more than chance.",
    )
    accuracy = Figure(
        "Answers that are right",
        figures.dots(
            [
                (name, paint, [_dot(_name(task, flips.all), getattr(task, key)) for task in every])
                for name, paint, key in (
                    ("original", "muted", "accuracy_reference"),
                    ("quantized", "accent", "accuracy_quantized"),
                )
            ],
            "share of items",
            tick=".0%",
            zero=False,
        ),
        (summary,),
        "Whiskers: Wilson's 95 % intervals.",
    )
    changed = Figure(
        "Answers that changed",
        figures.bars(
            [
                ("right to wrong", "bad", [task.right_to_wrong.share for task in every]),
                ("wrong to right", "good", [task.wrong_to_right.share for task in every]),
                ("wrong to another wrong", "muted", [_other(task) for task in every]),
            ],
            [_name(task, flips.all) for task in every],
            "share of items",
            ".1%",
            "%{y}: %{x:.2%}",
        ),
        (_margins(every, flips.all),),
    )
    lede = (
        f"Both models answered {flips.all.items:,} multiple-choice items by the likelihood of the options. "
        f"{flips.all.changed.count:,} answers changed; equal accuracy alone would hide them."
    )
    folded = tuple(_answers(task) for task in tasks if any(a.reference != a.quantized for a in task.answers))
    return [Section("flips", "Flips", lede, (accuracy, changed), (summary,), folded=folded)]


def _name(task: Task, every: Task) -> str:
    return "all tasks" if task is every else task.task


def _share(share: Share) -> str:
    at = between(share.low, share.high, lambda value: percent(value, 1))
    return f"{percent(share.share, 1)} ({at})"


def _p(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _dot(name: str, share: Share) -> figures.Dot:
    at = between(share.low, share.high, percent)
    return name, share.share, share.low, share.high, f"{percent(share.share)} ({at})"


def _other(task: Task) -> float:
    return max(0.0, task.changed.share - task.right_to_wrong.share - task.wrong_to_right.share)


def _margins(every: list[Task], all_of_them: Task) -> Table:
    rows = [
        (
            _name(task, all_of_them),
            f"{task.right_to_wrong.count:,}",
            f"{task.wrong_to_right.count:,}",
            f"{task.changed.count:,}",
            _margin(task.margin_of_changed),
            _margin(task.margin_of_all),
        )
        for task in every
    ]
    columns = (
        "task",
        ">right to wrong",
        ">wrong to right",
        ">changed in all",
        ">original's margin there",
        ">on all items",
    )
    return table(
        "Answers that changed",
        columns,
        rows,
        "A margin is how far, in nats, the original preferred its answer to the next: small ones flip.",
    )


def _margin(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _answers(task: Task) -> Table:
    changed = [answer for answer in task.answers if answer.reference != answer.quantized]
    rows = [
        (a.id, a.right, a.reference, a.quantized, _margin(a.margin_reference), _margin(a.margin_quantized))
        for a in changed[:MOST_ANSWERS]
    ]
    note = f"The first {MOST_ANSWERS} of {len(changed):,}." if len(changed) > MOST_ANSWERS else ""
    columns = ("item", ">right", ">original's", ">quantized's", ">margin, original", ">margin, quantized")
    return table(f"Changed answers of {task.task}, by number of the option", columns, rows, note)
