"""Answer flips: multiple-choice items that two models answer differently.

"Accuracy is Not All You Need" (arXiv 2407.09141): many answers of a compressed model change while its accuracy stays,
because as many turn right as turn wrong. So the changes are counted in each direction, with Wilson's intervals.
McNemar's exact test asks whether one direction outweighs the other. The reference's margin on changed answers tells a
loss from a coin toss: an answer that was nearly a tie may flip by noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..core.record.flips import Answer, Share, TaskFlips
from .intervals import mcnemar, wilson


@dataclass(frozen=True)
class Answered:
    """One item: its options' scores (nats, normalised as the task says) in both models, and the right option."""

    id: str
    right: int
    scores_reference: tuple[float, ...]
    scores_quantized: tuple[float, ...]

    @property
    def reference(self) -> int:
        return _best(self.scores_reference)

    @property
    def quantized(self) -> int:
        return _best(self.scores_quantized)

    @property
    def margin_reference(self) -> float:
        return _margin(self.scores_reference)

    @property
    def margin_quantized(self) -> float:
        return _margin(self.scores_quantized)


def _best(scores: tuple[float, ...]) -> int:
    return scores.index(max(scores))


def _margin(scores: tuple[float, ...]) -> float:
    """The best option's score minus the second best's, in nats."""
    first, second = sorted(scores, reverse=True)[:2]
    return first - second


def _share(count: int, of: int) -> Share:
    interval = wilson(count, of)
    return Share(share=count / of, low=interval.low, high=interval.high, count=count)


def summarize_answers(answered: Sequence[Answered]) -> TaskFlips:
    """Figures over at least one item, as those of all tasks together."""
    items = len(answered)
    changed = [a for a in answered if a.reference != a.quantized]
    lost = sum(a.reference == a.right for a in changed)
    won = sum(a.quantized == a.right for a in changed)
    return TaskFlips(
        task="all",
        items=items,
        accuracy_reference=_share(sum(a.reference == a.right for a in answered), items),
        accuracy_quantized=_share(sum(a.quantized == a.right for a in answered), items),
        changed=_share(len(changed), items),
        right_to_wrong=_share(lost, items),
        wrong_to_right=_share(won, items),
        mcnemar_p=mcnemar(lost, won),
        margin_of_changed=fmean(a.margin_reference for a in changed) if changed else None,
        margin_of_all=fmean(a.margin_reference for a in answered),
    )


def answers(answered: Sequence[Answered]) -> tuple[Answer, ...]:
    """Every item with both models' answers: a gate pairs two runs by them."""
    return tuple(
        Answer(
            id=a.id,
            right=a.right,
            reference=a.reference,
            quantized=a.quantized,
            margin_reference=a.margin_reference,
            margin_quantized=a.margin_quantized,
        )
        for a in answered
    )
