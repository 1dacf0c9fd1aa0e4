"""Requests in a twin walk: log-likelihoods equal those of transformers' whole models, and the rows' results don't
change.

The slow versions load both models whole and score one request at a time from all its logits in fp64.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from babies import changed_copy, noise
from onecard.checkpoint.activations import Activations
from onecard.checkpoint.loading import load_with_transformers
from onecard.checkpoint.model import open_model
from onecard.core.errors import InputError
from onecard.core.rows import Row
from onecard.eval.choice import LENGTHS, OptionRequest, Scored, ask, scores
from onecard.eval.kl import TokenResults
from onecard.eval.twin import Asked, Twin, twin_walk
from walking import cpu_walk

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair:
    """A baby on disk, and a copy with noise on every weight."""

    reference: Path
    quantized: Path

    def walk(
        self, folder: Path, rows: list[Row], asked: tuple[Asked, ...] = (), batch_tokens: int = 96, **more: Any
    ) -> Twin:
        walk, other = cpu_walk(open_model(str(self.reference)), batch_tokens), open_model(str(self.quantized))
        quantized = walk.beside(other.adapter, other.source)
        found = twin_walk(walk, quantized, rows, Activations(folder), asked=asked, **more)
        assert not any(path.is_file() for path in folder.rglob("*")), "the store is empty again"
        return found


@pytest.fixture(scope="module")
def pair(baby: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(family: str) -> Pair:
        if family not in made:
            folder = tmp_path_factory.mktemp("pair") / family
            made[family] = Pair(baby(family), changed_copy(baby(family), folder, noise(0.2)))
        return made[family]

    return get


def ids(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 240, (length,), generator=generator).tolist())


def slow_score(model: Any, request: OptionRequest) -> tuple[float, bool]:
    """(log-likelihood of the continuation, whether greedy decoding would write it)."""
    whole = torch.tensor([request.context + request.continuation])
    with torch.inference_mode():
        logits = model(input_ids=whole, use_cache=False).logits[0].double()
    start = len(request.context)
    own = torch.log_softmax(logits, -1)[start - 1 : start - 1 + len(request.continuation)]
    targets = torch.tensor(request.continuation)
    return float(own.gather(1, targets[:, None]).sum()), bool(torch.equal(own.argmax(-1), targets))


def greedy(model: Any, context: tuple[int, ...], count: int) -> tuple[int, ...]:
    written: tuple[int, ...] = ()
    for _ in range(count):
        with torch.inference_mode():
            written += (int(model(input_ids=torch.tensor([context + written])).logits[0, -1].argmax()),)
    return written


@pytest.mark.parametrize("family", ["scout", "maverick", "llama4-text", "qwen3"])
def test_scores_are_those_of_the_whole_models(pair: Callable[[str], Pair], tmp_path: Path, family: str) -> None:
    """Contexts below and far over the attention chunk of 8; options of one token and of several lengths."""
    models = [load_with_transformers(path, torch.float32) for path in (pair(family).reference, pair(family).quantized)]
    requests = []
    for number, length in enumerate([1, 5, 16, 17, 40, 40]):
        context = ids(length, number)
        requests += [OptionRequest(context, (token,)) for token in ids(4, 100 + number)]
        requests += [OptionRequest(context, ids(size, 200 + 10 * number + size)) for size in (1, 2, 7)]
        # Each model's own continuation: only this one is greedy.
        requests += [OptionRequest(context, greedy(model, context, 3)) for model in models]
    asking = ask(requests)
    assert len(asking.asked) < len(requests)
    twin = pair(family).walk(tmp_path / "acts", [], asking.asked)
    assert twin.tokens is None
    assert twin.answers is not None
    found = scores(asking, twin.answers)
    assert len(found) == len(requests)
    for request, got in zip(requests, found, strict=True):
        (p, p_greedy), (q, q_greedy) = (slow_score(model, request) for model in models)
        assert (got.logp_reference, got.logp_quantized) == pytest.approx((p, q), rel=1e-4, abs=1e-4)
        assert (got.greedy_reference, got.greedy_quantized) == (p_greedy, q_greedy)
    assert len({round(got.logp_reference - got.logp_quantized, 3) for got in found}) > 20, "two models that differ"
    assert {got.greedy_reference for got in found} == {got.greedy_quantized for got in found} == {True, False}
    assert any(got.greedy_reference != got.greedy_quantized for got in found)


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_what_is_asked_changes_nothing_of_the_rows(pair: Callable[[str], Pair], tmp_path: Path, family: str) -> None:
    """Rows and requests share a walk: results, routes and errors are the same to the bit as without requests, and
    answers as without rows."""
    rows = [Row(f"row-{n}", "text", torch.tensor(ids(length, 50 + n))) for n, length in enumerate([33, 9, 16, 33, 48])]
    # Some rows and requests have the same length: they still share no batch.
    asking = ask([OptionRequest(ids(length, n), ids(2, 70 + n)) for n, length in enumerate([4, 15, 30, 47])])
    assert {len(item.row.tokens) for item in asking.asked} & {len(row.tokens) for row in rows}
    both = pair(family).walk(tmp_path / "both", rows, asking.asked, with_errors=True)
    alone = pair(family).walk(tmp_path / "rows", rows, with_errors=True)
    asked = pair(family).walk(tmp_path / "asked", [], asking.asked)
    assert both.tokens is not None
    assert both.answers is not None
    for name in [field.name for field in fields(TokenResults)]:
        assert torch.equal(getattr(both.tokens, name), getattr(alone.tokens, name)), name
        assert torch.equal(getattr(both.answers, name), getattr(asked.answers, name)), name
    assert both.changed_routes == alone.changed_routes
    assert both.errors is not None
    assert alone.errors is not None
    assert both.errors.facts({}) == alone.errors.facts({})
    assert alone.answers is None
    assert asked.changed_routes == {}
    assert asked.mean_changed_routes is None


def test_batches_of_any_size_answer_alike(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    asking = ask([OptionRequest(ids(length, n), ids(3, 20 + n)) for n, length in enumerate([3, 30, 14, 3, 50, 8])])
    found = []
    for tokens in (1, 64, 10_000):
        answers = pair("qwen3").walk(tmp_path / str(tokens), [], asking.asked, tokens).answers
        assert answers is not None
        found.append(scores(asking, answers))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a.logp_reference, a.logp_quantized) == pytest.approx((b.logp_reference, b.logp_quantized), rel=1e-5)


# Rows


def test_one_token_options_share_a_row_and_others_what_they_can() -> None:
    context = ids(20, 1)
    requests = [OptionRequest(context, (n,)) for n in range(4)] + [
        OptionRequest(context, (7, 8)),
        OptionRequest(context, (7, 9)),
    ]
    asking = ask([*requests, OptionRequest((*context, 7), (8,))])
    assert len(asking.asked) == 2
    assert [row for row, _, _ in asking.places] == [0, 0, 0, 0, 1, 1, 1]
    first, second = asking.asked
    assert first.positions.tolist() == [19] * 4
    assert first.targets.tolist() == [0, 1, 2, 3]
    assert second.positions.tolist() == [19, 20, 19, 20, 20]
    assert second.targets.tolist() == [7, 8, 7, 9, 8]


def test_rows_are_filled_up_behind_what_is_asked() -> None:
    asking = ask([OptionRequest(ids(length, length), ids(2, 99)) for length in range(1, 40)])
    assert {len(item.row.tokens) % LENGTHS for item in asking.asked} == {0}
    for item, length in zip(asking.asked, range(1, 40), strict=True):
        assert item.row.tokens[: length + 1].tolist() == [*ids(length, length), ids(2, 99)[0]]
        assert len(item.row.tokens) - (length + 1) < LENGTHS


def test_nothing_asked_is_nothing_walked() -> None:
    assert ask([]).asked == ()


@pytest.mark.parametrize("request_", [OptionRequest((), (1,)), OptionRequest((1,), ())])
def test_an_empty_question_or_option_is_refused(request_: OptionRequest) -> None:
    with pytest.raises(InputError, match="empty"):
        ask([OptionRequest((1, 2), (3,)), request_])


def test_scores_find_their_answers_in_any_order_of_batches() -> None:
    """The walk answers longest rows first; these numbers encode row and position."""
    requests = [
        OptionRequest(ids(3, 0), (5, 6)),
        OptionRequest(ids(60, 1), (7,)),
        OptionRequest(ids(60, 1), (8,)),
        OptionRequest(ids(3, 0), (9, 9)),
    ]
    asking = ask(requests)
    targets = {0: [5, 6], 1: [7, 8], 2: [9, 9]}
    walked = []
    for row in (1, 0, 2):
        for place, target in enumerate(targets[row]):
            walked.append((row, place, target))
    document = torch.tensor([row for row, _, _ in walked])
    logp = torch.tensor([-(10.0 * row + place) for row, place, _ in walked])
    right = torch.tensor([[target] for _, _, target in walked])
    answers = TokenResults(
        logp,
        logp,
        right,
        right + (document == 0)[:, None],
        logp[:, None],
        logp[:, None],
        logp,
        2 * logp,
        document,
        document,
    )
    got = scores(asking, answers)
    assert got == [
        Scored(-1.0, -2.0, True, False),
        Scored(-10.0, -20.0, True, True),
        Scored(-11.0, -22.0, True, True),
        Scored(-41.0, -82.0, True, True),
    ]
