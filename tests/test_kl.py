"""KL over vocabulary slices and the other facts of a token, against the whole softmax in fp64.

The slow versions hold all logits at once and write every formula out.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.eval.kl import TOP, TokenResults, compare, concatenate

TOKENS, VOCAB = 40, 101


def logits(seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(reference [T, V], quantized [T, V], targets [T], documents [T])."""
    generator = torch.Generator().manual_seed(seed)
    p = scale * torch.randn(TOKENS, VOCAB, generator=generator)
    q = p + 0.1 * scale * torch.randn(TOKENS, VOCAB, generator=generator)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[:2] = torch.tensor([0, VOCAB - 1])
    return p, q, targets, torch.arange(TOKENS) // 7


def compared(
    p: torch.Tensor, q: torch.Tensor, widths: list[int], targets: torch.Tensor, document: torch.Tensor
) -> TokenResults:
    """`compare`, where a token's position is its number."""
    return compare(sliced(p, q, widths), targets, document, torch.arange(len(p)))


def sliced(p: torch.Tensor, q: torch.Tensor, widths: list[int]) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    starts = [sum(widths[:n]) for n in range(len(widths))]
    assert sum(widths) == p.shape[1]
    return [(s, p[:, s : s + w], q[:, s : s + w]) for s, w in zip(starts, widths, strict=True)]


def naive_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """sum_v P(v) (log P(v) - log Q(v)), in fp64, token by token."""
    out = []
    for p_V, q_V in zip(p.double(), q.double(), strict=True):
        log_p, log_q = torch.log_softmax(p_V, 0), torch.log_softmax(q_V, 0)
        out.append(torch.sum(torch.exp(log_p) * (log_p - log_q)))
    return torch.stack(out)


def log_probability(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.log_softmax(row.double(), 0)[t] for row, t in zip(x, targets, strict=True)])


widths = st.lists(st.integers(1, 60), min_size=1, max_size=8).map(
    lambda w: [*[x for n, x in enumerate(w) if sum(w[: n + 1]) < VOCAB], 0]
)


@settings(deadline=None)
@given(st.integers(0, 2**31), widths, st.sampled_from([0.01, 3.0, 30.0]))
def test_slices_of_any_widths_give_the_whole_softmax(seed: int, parts: list[int], scale: float) -> None:
    p, q, targets, document = logits(seed, scale)
    parts = [*parts[:-1], VOCAB - sum(parts)]
    got = compared(p, q, parts, targets, document)
    torch.testing.assert_close(got.kl_nats.double(), naive_kl(p, q).clamp_min(0), rtol=1e-4, atol=2e-6 * (1 + scale))
    torch.testing.assert_close(
        got.reverse_kl_nats.double(), naive_kl(q, p).clamp_min(0), rtol=1e-4, atol=2e-6 * (1 + scale)
    )
    for top, top_p, x in (
        (got.top_reference, got.top_p_reference, p),
        (got.top_quantized, got.top_p_quantized, q),
    ):
        probabilities, tokens = torch.softmax(x.double(), -1).sort(-1, descending=True)
        assert torch.equal(top.long(), tokens[:, :TOP])
        torch.testing.assert_close(top_p.double(), probabilities[:, :TOP], rtol=2e-5, atol=1e-7)
    assert torch.equal(got.same_top1, p.argmax(-1) == q.argmax(-1))
    for mine, x in ((got.logp_reference, p), (got.logp_quantized, q)):
        torch.testing.assert_close(mine.double(), log_probability(x, targets), rtol=1e-5, atol=1e-5)
    assert torch.equal(got.document, document)
    assert torch.equal(got.position, torch.arange(TOKENS))
    assert len(got) == TOKENS


@pytest.mark.parametrize("parts", [[VOCAB], [1] * VOCAB, [50, 51], [100, 1], [1, 100]])
def test_fixed_slices(parts: list[int]) -> None:
    p, q, targets, document = logits(5)
    got = compared(p, q, parts, targets, document)
    torch.testing.assert_close(got.kl_nats.double(), naive_kl(p, q), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_equal_logits_have_a_kl_of_zero(scale: float) -> None:
    p, _, targets, document = logits(6, scale)
    got = compared(p, p.clone(), [30, 71], targets, document)
    assert (got.kl_nats == 0).all()
    assert (got.reverse_kl_nats == 0).all()
    assert torch.equal(got.logp_reference, got.logp_quantized)
    assert torch.equal(got.top_reference, got.top_quantized)
    assert torch.equal(got.top_p_reference, got.top_p_quantized)
    assert got.same_top1.all()
    assert (got.top_overlap == 1).all()


@pytest.mark.parametrize("parts", [[VOCAB], [10, 91], [1] * VOCAB])
def test_large_logits_stay_finite_and_right(parts: list[int]) -> None:
    p, q, targets, document = logits(7)
    p, q = p.clone(), q.clone()
    p[0], q[0] = 1e4, -1e4  # logits differ by shifts alone: both distributions are uniform
    p[1], q[1] = -1e4, 1e4
    p[2, 3], q[2, 90] = 1e4, 1e4  # all mass in two places
    p[3, 90], q[3, 90] = -1e4, 1e4
    p[4, 0], p[4, 100], q[4, 0], q[4, 100] = 1e4, 1e4, 1e4, 1e4 - 1
    p[5, 50], q[5, 50] = 1e4, -1e4
    got = compared(p, q, parts, targets, document)
    for values in (got.kl_nats, got.reverse_kl_nats, got.logp_reference, got.logp_quantized, got.top_p_quantized):
        assert torch.isfinite(values).all()
    torch.testing.assert_close(got.kl_nats.double(), naive_kl(p, q), rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(got.reverse_kl_nats.double(), naive_kl(q, p), rtol=1e-5, atol=2e-3)
    assert got.kl_nats[:2].max() < 2e-3
    assert got.kl_nats[2] == pytest.approx(1e4, rel=1e-2)


def test_kl_has_a_direction_and_half_precision_is_summed_in_fp32() -> None:
    p, q, targets, document = logits(8)
    there = compared(p, q, [VOCAB], targets, document)
    back = compared(q, p, [VOCAB], targets, document)
    assert not torch.allclose(there.kl_nats, back.kl_nats, rtol=1e-2)
    for mine, theirs in ((there.reverse_kl_nats, back.kl_nats), (there.kl_nats, back.reverse_kl_nats)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    low_p, low_q = p.bfloat16(), q.bfloat16()
    got = compared(low_p, low_q, [50, 51], targets, document)
    assert got.kl_nats.dtype == torch.float32
    torch.testing.assert_close(got.kl_nats.double(), naive_kl(low_p, low_q), rtol=1e-4, atol=1e-6)


def test_parts_are_joined_in_order() -> None:
    p, q, targets, document = logits(9)
    whole = compared(p, q, [VOCAB], targets, document)
    cut = [slice(0, 13), slice(13, 14), slice(14, TOKENS)]
    places = torch.arange(TOKENS)
    joined = concatenate([compare([(0, p[c], q[c])], targets[c], document[c], places[c]) for c in cut])
    for name in TokenResults.__dataclass_fields__:
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name


@pytest.mark.parametrize("parts", [[VOCAB], [1] * VOCAB, [3, 7, 91], [50, 51], [99, 2]])
def test_of_equal_logits_the_first_of_the_vocabulary_wins(parts: list[int]) -> None:
    """Two runs that cut the vocabulary differently call the same token the likeliest."""
    generator = torch.Generator().manual_seed(12)
    p = torch.randint(0, 3, (TOKENS, VOCAB), generator=generator).float()
    p[0] = 0.0
    q = torch.randint(0, 2, (TOKENS, VOCAB), generator=generator).float()
    _, _, targets, document = logits(12)
    got = compared(p, q, parts, targets, document)
    for top, x in ((got.top_reference, p), (got.top_quantized, q)):
        order = x.sort(dim=-1, descending=True, stable=True).indices
        assert torch.equal(top.long(), order[:, :TOP])


def test_the_overlap_counts_tokens_whatever_their_order() -> None:
    p = torch.zeros(4, VOCAB)
    p[:, :5] = torch.tensor([9.0, 8, 7, 6, 5])
    q = torch.zeros(4, VOCAB)
    q[0, :5] = torch.tensor([5.0, 6, 7, 8, 9])  # the same five backwards
    q[1, 2:7] = torch.tensor([9.0, 8, 7, 6, 5])  # 2, 3 and 4 of them
    q[2, 50:55] = torch.tensor([9.0, 8, 7, 6, 5])  # none
    q[3, [0, 90, 91, 92, 93]] = torch.tensor([9.0, 8, 7, 6, 5])  # the first alone
    got = compared(p, q, [30, 71], torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    assert got.top_overlap.tolist() == pytest.approx([1.0, 0.6, 0.0, 0.2])
    assert got.same_top1.tolist() == [False, False, False, True]


def test_probabilities_are_of_the_whole_vocabulary() -> None:
    """A later slice can displace tokens of earlier ones from the top five."""
    p = torch.full((2, VOCAB), -5.0)
    p[0, 3], p[1, 100] = 2.0, 40.0
    got = compared(p, p, [10, 10, 81], torch.tensor([3, 3]), torch.zeros(2, dtype=torch.int64))
    mass = float(torch.exp(torch.tensor(7.0, dtype=torch.float64)))
    assert float(got.top_p_reference[0, 0]) == pytest.approx(mass / (mass + VOCAB - 1), rel=1e-6)
    assert float(got.top_p_reference[1, 0]) == pytest.approx(1.0)
    assert float(got.logp_reference[1]) == pytest.approx(-45.0, rel=1e-6)
