"""KL per token between two models over a large vocabulary, in slices and in fp32, with each token's other figures.

No model's logits are held whole. Slices of the vocabulary pass by, and running sums (the online softmax) give in one
pass the log-normalisers, both KLs, each model's five likeliest tokens and the log-probability of the true next token:

    Zp = sum e^p,  Zq = sum e^q,  A = sum e^p (p - q),  B = sum e^q (q - p)
    KL(p || q) = A / Zp - log Zp + log Zq,  KL(q || p) = B / Zq - log Zq + log Zp

Shape legend: T tokens, K likeliest tokens kept, H hidden size, V vocabulary, C columns of the vocabulary in one slice.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

from ..core.errors import OnecardError
from ..core.finite import all_finite, count_nonfinite, nonfinite_error
from ..core.products import product
from ..core.slices import COLUMNS_PER_SLICE, TOKENS_PER_SLICE

# The number of likeliest tokens that are compared: the overlap of the top five is what is usually quoted.
TOP = 5


@dataclass(frozen=True)
class TokenResults:
    """The figures of every predicted token, on the CPU; fp32 [T] unless said otherwise."""

    # KL(reference || quantized), and the reverse.
    kl_nats: torch.Tensor
    reverse_kl_nats: torch.Tensor
    # The likeliest tokens, likeliest first, int32 [T, K], and their probabilities, fp32 [T, K].
    top_reference: torch.Tensor
    top_quantized: torch.Tensor
    top_p_reference: torch.Tensor
    top_p_quantized: torch.Tensor
    # Log-probability of the true token.
    logp_reference: torch.Tensor
    logp_quantized: torch.Tensor
    # The row, and the position in it that the prediction was made from: int64 [T].
    document: torch.Tensor
    position: torch.Tensor

    def __len__(self) -> int:
        return len(self.kl_nats)

    @property
    def same_top1(self) -> torch.Tensor:
        """bool [T]: whether both models have the same likeliest token."""
        return self.top_reference[:, 0] == self.top_quantized[:, 0]

    @property
    def top_overlap(self) -> torch.Tensor:
        """fp32 [T]: the share of the reference's K likeliest tokens that are among the other model's."""
        both = (self.top_reference[:, :, None] == self.top_quantized[:, None, :]).any(-1)
        return both.float().mean(-1)


def concatenate(parts: list[TokenResults]) -> TokenResults:
    return TokenResults(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(TokenResults)))


class _Online:
    """Running log-sum-exp, likeliest tokens and picked logit of one model."""

    def __init__(self, targets_T: torch.Tensor) -> None:
        n, device = len(targets_T), targets_T.device
        self.targets = targets_T
        self.peak = torch.full((n,), -torch.inf, device=device)
        self.total = torch.zeros(n, device=device)
        self.top_TK = torch.full((n, TOP), -torch.inf, device=device)
        self.index_TK = torch.full((n, TOP), -1, dtype=torch.int64, device=device)
        self.picked = torch.zeros(n, device=device)

    def add(self, logits_TC: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in the slice that starts at column `start`. Returns (factor for older sums, exp(logits - new peak))."""
        top, index = _likeliest(logits_TC)
        # Older ones stand first, so that among equal logits the first of the vocabulary wins, as in one argmax.
        merged, order = torch.cat([self.top_TK, top], -1).sort(dim=-1, descending=True, stable=True)
        self.index_TK = torch.cat([self.index_TK, index + start], -1).gather(1, order)[:, :TOP]
        self.top_TK = merged[:, :TOP]
        peak = self.top_TK[:, 0]
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

    @property
    def top_p(self) -> torch.Tensor:
        """[T, K]"""
        return torch.exp(self.top_TK - self.log_total[:, None])


def _likeliest(logits_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, columns) of the largest, each [T, K or fewer], in the order of the columns. Among equal logits the first
    columns are taken; topk alone would take any."""
    columns = logits_TC.shape[1]
    top, index = logits_TC.topk(min(TOP + 1, columns), -1)
    index = index[:, :TOP]
    if columns > TOP:
        tied = top[:, TOP - 1] == top[:, TOP]
        if tied.any():
            index[tied] = logits_TC[tied].sort(dim=-1, descending=True, stable=True).indices[:, :TOP]
    index = index.sort(-1).values
    return logits_TC.gather(1, index), index


def compare_rows(
    rows: tuple[torch.Tensor, torch.Tensor],
    heads: tuple[torch.Tensor, torch.Tensor],
    targets_T: torch.Tensor,
    document_T: torch.Tensor,
    position_T: torch.Tensor,
) -> TokenResults:
    """`rows`: normed hidden rows [T, H] of the original and of another model; `heads`: [V, H]. Sliced by tokens and by
    vocabulary. Raises UnusableModelError or NonfiniteError for logits that are not finite."""
    parts = []
    for start in range(0, len(targets_T), TOKENS_PER_SLICE):
        part = slice(start, start + TOKENS_PER_SLICE)
        with torch.inference_mode():
            p_TH, q_TH = rows[0][part], rows[1][part]
            slices = (
                (column, product(p_TH, heads[0][columns].T), product(q_TH, heads[1][columns].T))
                for column in range(0, len(heads[0]), COLUMNS_PER_SLICE)
                for columns in [slice(column, column + COLUMNS_PER_SLICE)]
            )
            parts.append(compare(slices, targets_T[part], document_T[part], position_T[part]))
            if not all_finite(parts[-1].kl_nats, parts[-1].reverse_kl_nats, *_logp(parts[-1])):
                raise _fault((p_TH, q_TH), heads)
    return concatenate(parts)


def _logp(results: TokenResults) -> tuple[torch.Tensor, torch.Tensor]:
    return results.logp_reference, results.logp_quantized


def _fault(rows: tuple[torch.Tensor, torch.Tensor], heads: tuple[torch.Tensor, torch.Tensor]) -> OnecardError:
    """Whose logits are not finite. Of both, the reference's count: nothing can be measured against those."""
    for side, (rows_TH, head_VH) in enumerate(zip(rows, heads, strict=True)):
        for column in range(0, len(head_VH), COLUMNS_PER_SLICE):
            logits_TC = product(rows_TH, head_VH[column : column + COLUMNS_PER_SLICE].T)
            if not all_finite(logits_TC):
                where = f"the logits from token {column:,} of the vocabulary on hold {count_nonfinite(logits_TC)}"
                return nonfinite_error(side == 0, where)
    return nonfinite_error(False, "its logits and the original's are further apart than float32 can say")


def compare(
    slices: Iterable[tuple[int, torch.Tensor, torch.Tensor]],
    targets_T: torch.Tensor,
    document_T: torch.Tensor,
    position_T: torch.Tensor,
) -> TokenResults:
    """`slices` yields (first column, reference logits [T, C], quantized logits [T, C]), in the order of columns."""
    p, q = _Online(targets_T), _Online(targets_T)
    gap = torch.zeros(len(targets_T), device=targets_T.device)
    reverse = torch.zeros_like(gap)
    for start, p_TC, q_TC in slices:
        p_TC, q_TC = p_TC.float(), q_TC.float()
        p_rescale, p_exp_TC = p.add(p_TC, start)
        q_rescale, q_exp_TC = q.add(q_TC, start)
        difference_TC = p_TC - q_TC
        gap = gap * p_rescale + torch.linalg.vecdot(p_exp_TC, difference_TC)
        reverse = reverse * q_rescale - torch.linalg.vecdot(q_exp_TC, difference_TC)
    kl = gap / p.total - p.log_total + q.log_total
    reverse_kl = reverse / q.total - q.log_total + p.log_total
    return TokenResults(
        # Rounding can leave -1e-8 where the true value is zero; KL is never negative.
        kl_nats=kl.clamp_min(0).cpu(),
        reverse_kl_nats=reverse_kl.clamp_min(0).cpu(),
        top_reference=p.index_TK.int().cpu(),
        top_quantized=q.index_TK.int().cpu(),
        top_p_reference=p.top_p.cpu(),
        top_p_quantized=q.top_p.cpu(),
        logp_reference=(p.picked - p.log_total).cpu(),
        logp_quantized=(q.picked - q.log_total).cpu(),
        document=document_T.cpu(),
        position=position_T.cpu(),
    )
