"""KL(reference || quantized) per token over a large vocabulary, in slices, in fp32.

Neither model's logits are ever held whole: slices of the vocabulary pass by, and running sums (the online softmax)
give the log-normalisers, the KL, both argmaxes and the log-probability of the true next token in one pass:

    Zp = sum e^p,  Zq = sum e^q,  A = sum e^p (p - q);   KL = A / Zp - log Zp + log Zq

Shape legend: T tokens, H hidden size, V vocabulary, C columns of the vocabulary in one slice.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class TokenResults:
    """Per predicted token: KL in nats, both argmaxes, both log-probabilities of the true token, its document."""

    kl_nats: torch.Tensor
    top1_reference: torch.Tensor
    top1_quantized: torch.Tensor
    logp_reference: torch.Tensor
    logp_quantized: torch.Tensor
    document: torch.Tensor


def concatenate(parts: list[TokenResults]) -> TokenResults:
    return TokenResults(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(TokenResults)))


class _Online:
    """Running log-sum-exp, argmax and picked logit of one model."""

    def __init__(self, targets_T: torch.Tensor) -> None:
        n = len(targets_T)
        device = targets_T.device
        self.targets = targets_T
        self.peak = torch.full((n,), -torch.inf, device=device)
        self.total = torch.zeros(n, device=device)
        self.best = torch.full((n,), -torch.inf, device=device)
        self.argmax = torch.zeros(n, dtype=torch.int64, device=device)
        self.picked = torch.zeros(n, device=device)

    def add(self, logits_TC: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (factor that old sums are multiplied with, exp of this slice under the new peak)."""
        top, index = logits_TC.max(-1)
        better = top > self.best
        self.argmax = torch.where(better, index + start, self.argmax)
        self.best = torch.maximum(self.best, top)
        peak = torch.maximum(self.peak, top)
        rescale = torch.exp(self.peak - peak)
        exp_TC = torch.exp(logits_TC - peak[:, None])
        self.total = self.total * rescale + exp_TC.sum(-1)
        self.peak = peak
        inside = (self.targets >= start) & (self.targets < start + logits_TC.shape[1])
        local = (self.targets - start).clamp(0, logits_TC.shape[1] - 1)
        self.picked = torch.where(inside, logits_TC.gather(1, local[:, None])[:, 0], self.picked)
        return rescale, exp_TC

    @property
    def log_total(self) -> torch.Tensor:
        return self.peak + torch.log(self.total)


def compare(
    slices: Iterable[tuple[int, torch.Tensor, torch.Tensor]], targets_T: torch.Tensor, document_T: torch.Tensor
) -> TokenResults:
    """`slices` yields (first column, reference logits [T, C], quantized logits [T, C]) over the whole vocabulary."""
    p, q = _Online(targets_T), _Online(targets_T)
    gap = torch.zeros(len(targets_T), device=targets_T.device)
    for start, p_TC, q_TC in slices:
        p_TC, q_TC = p_TC.float(), q_TC.float()
        rescale, weight_TC = p.add(p_TC, start)
        q.add(q_TC, start)
        gap = gap * rescale + (weight_TC * (p_TC - q_TC)).sum(-1)
    kl = gap / p.total - p.log_total + q.log_total
    return TokenResults(
        # Rounding can leave -1e-8 where the true value is zero: KL is never negative.
        kl_nats=kl.clamp_min(0).cpu(),
        top1_reference=p.argmax.cpu(),
        top1_quantized=q.argmax.cpu(),
        logp_reference=(p.picked - p.log_total).cpu(),
        logp_quantized=(q.picked - q.log_total).cpu(),
        document=document_T.cpu(),
    )
