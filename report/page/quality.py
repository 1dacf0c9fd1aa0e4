"""Sections on KL: its distribution over tokens, and its mean by position, kind of text and confidence."""

from collections.abc import Sequence

from ...core.record.kl import Bucket, Histogram, KlSummary
from ...core.record.schema import Record
from ...core.units import ABSENT, percent
from . import figures
from .parts import Figure, Section, Table, between, count, nats, table


def kl_sections(record: Record) -> list[Section]:
    kl = record.kl
    if kl is None:
        return []
    return [_distribution(kl), *_buckets(kl)]


def _distribution(kl: KlSummary) -> Section:
    how = "95 % intervals take a document as one draw."
    if kl.interval is not None:
        times = f", {kl.interval.resamples:,} resamples" if kl.interval.resamples else ""
        seed = f", seed {kl.interval.seed}" if kl.interval.seed is not None else ""
        how = f"Intervals: {kl.interval.method}, level {kl.interval.level:.0%}{times}{seed}."
    summary = table("All figures", ("figure", ">value", ">interval"), _all_figures(kl), how)
    folded = tuple(each for each in (_moved(kl), _routed(kl)) if each.rows)
    title = "How far from the original"
    if kl.histogram is None:
        lede = f"{count(kl.tokens)} tokens. The record holds no histogram."
        return Section("kl", title, lede, tables=(summary,), folded=folded)
    lede = (
        f"Each of {count(kl.tokens)} tokens has its own KL: most are near zero, and a few make up the mean. Half are "
        f"below {nats(kl.kl_median_nats)} nats."
    )
    return Section("kl", title, lede, (_histogram(kl, kl.histogram),), (summary,), folded=folded)


def _all_figures(kl: KlSummary) -> list[tuple[str, str, str]]:
    """Rows of (figure, value, interval), of what the record holds."""
    rows = [
        ("mean KL(original || quantized), nats", nats(kl.kl_mean_nats), between(kl.kl_low_nats, kl.kl_high_nats, nats))
    ]
    if kl.floor is not None:
        name = f"floor: mean KL(original in float32 || original in {kl.floor.compute_dtype}), nats"
        ends = between(kl.floor.kl_low_nats, kl.floor.kl_high_nats, nats)
        rows.append((name, nats(kl.floor.kl_mean_nats), ends))
    for name, value in (
        ("KL, median, nats", kl.kl_median_nats),
        ("KL, 90 %, nats", kl.kl_p90_nats),
        ("KL, 95 %, nats", kl.kl_p95_nats),
        ("KL, 99 %, nats", kl.kl_p99_nats),
        ("KL, 99.9 %, nats", kl.kl_p999_nats),
        ("KL, largest, nats", kl.kl_max_nats),
        ("mean reverse KL(quantized || original), nats", kl.reverse_kl_mean_nats),
    ):
        if value is not None:
            rows.append((name, nats(value), ABSENT))
    if kl.same_top1 is not None:
        rows.append(("same top-1", percent(kl.same_top1), between(kl.same_top1_low, kl.same_top1_high, percent)))
    if kl.top5_overlap is not None:
        rows.append(("overlap of the top 5", percent(kl.top5_overlap), ABSENT))
    if kl.perplexity_reference is not None and kl.perplexity_quantized is not None:
        rows.append(("perplexity of the original", f"{kl.perplexity_reference:.3f}", ABSENT))
        rows.append(("perplexity, quantized", f"{kl.perplexity_quantized:.3f}", ABSENT))
    if kl.perplexity_ratio is not None:
        ends = between(kl.perplexity_ratio_low, kl.perplexity_ratio_high, "{:.5f}".format)
        rows.append(("ratio of perplexities", f"{kl.perplexity_ratio:.5f}", ends))
    if kl.changed_routes is not None:
        rows.append(("tokens sent to other experts, a layer", percent(kl.changed_routes), ABSENT))
    return rows


def _moved(kl: KlSummary) -> Table:
    changes = [("mean", kl.delta_p_mean), ("root mean square", kl.delta_p_rms)]
    changes += [(f"{name.removeprefix('p').lstrip('0')} % quantile", p) for name, p in kl.delta_p_quantiles.items()]
    rows = [(name, f"{value:+.3%}") for name, value in changes if value is not None]
    return table("Change of the true token's probability", ("figure", ">quantized less original"), rows)


def _routed(kl: KlSummary) -> Table:
    rows = [(block, percent(share)) for block, share in kl.changed_routes_by_block.items()]
    return table("Tokens sent to other experts", ("block", ">share of tokens"), rows)


def _histogram(kl: KlSummary, histogram: Histogram) -> Figure:
    edges, counts = histogram.edges_nats, histogram.tokens
    total = max(1, sum(counts))
    bins = [
        (f"{a:.3g} to {b:.3g}", f"{n:,}", f"{n / total:.2%}") for a, b, n in zip(edges, edges[1:], counts, strict=False)
    ]
    lines = (("mean", kl.kl_mean_nats), ("median", kl.kl_median_nats), ("99 %", kl.kl_p99_nats))
    marks = sorted(((name, value) for name, value in lines if value is not None), key=lambda mark: mark[1])
    listing = table("KL of single tokens", ("nats", ">tokens", ">share"), bins)
    return Figure("KL of single tokens", figures.histogram(edges, counts, marks), (listing,))


def _figure(title: str, what: str, buckets: Sequence[Bucket], upright: bool, mean: float) -> Figure:
    rows = [
        (
            b.label,
            f"{b.tokens:,}",
            b.documents,
            nats(b.kl_mean_nats),
            between(b.kl_low_nats, b.kl_high_nats, nats),
            percent(b.same_top1),
        )
        for b in buckets
    ]
    entries = [
        (
            b.label,
            b.kl_mean_nats,
            b.kl_low_nats,
            b.kl_high_nats,
            figures.nats_said(b.label, b.kl_mean_nats, b.kl_low_nats, b.kl_high_nats),
        )
        for b in buckets
    ]
    return Figure(
        title,
        figures.dots([("mean KL", "accent", entries)], "mean KL, nats a token", upright, mean),
        (table(title, (what, ">tokens", ">documents", ">mean KL", ">95 %", ">same top-1"), rows),),
        "Whiskers: 95 % intervals. Dotted: all tokens together.",
    )


def _buckets(kl: KlSummary) -> list[Section]:
    mean = kl.kl_mean_nats
    out = []
    if kl.by_position:
        first, last = kl.by_position[0], kl.by_position[-1]
        lede = (
            f"Does the difference grow with context? It is {nats(first.kl_mean_nats)} nats at positions "
            f"{first.label} and {nats(last.kl_mean_nats)} at {last.label}."
        )
        figure = _figure("KL by position in the row", "position", kl.by_position, True, mean)
        out.append(Section("position", "By position", lede, (figure,)))
    if kl.by_kind:
        worst = max(kl.by_kind, key=lambda bucket: bucket.kl_mean_nats)
        lede = f"It is largest for {worst.label}: {nats(worst.kl_mean_nats)} nats."
        drawn = [_figure("KL by kind of text", "kind", kl.by_kind, False, mean)]
        if kl.by_likeness:
            means = ", ".join(f"{bucket.label} {nats(bucket.kl_mean_nats)} nats" for bucket in kl.by_likeness)
            lede += f" Of kinds that calibration had, and of others: {means}."
            drawn.append(_figure("KL of texts like calibration and of others", "texts", kl.by_likeness, False, mean))
        out.append(Section("kind", "By kind", lede, tuple(drawn)))
    if kl.by_confidence:
        lede = (
            "How sure the original was of its first choice, and what became of it. Where it was nearly certain, even a "
            "small KL can cost the right word."
        )
        figure = _figure(
            "KL by the original's confidence", "its first choice's probability", kl.by_confidence, True, mean
        )
        out.append(Section("confidence", "By confidence", lede, (figure,)))
    return out
