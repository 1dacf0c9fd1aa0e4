"""What one batch of the two streams adds to the statistics of a half's sites: second moments, misses and slopes.

A miss is the reference stream minus the quantized stream, for the same token. Tokens whose routes differ are left out,
but where a site reads a norm: the router decides the routes, so it and whatever comes before it get all tokens.

A CPU goes expert by expert, and picks rows. A GPU takes the rows of all experts as one, because every operation is a
launch, and gives left-out tokens the weight zero, because picking makes the host wait. Both give the same sums, but for
the rounding that `scaled` tells of.

Where the routing weight g multiplies an expert's output, its down projection adds W (g x) to the residual stream: g x
counts as what it reads. An error of its gate and up is multiplied by g too, so their rows count g^2 times.

Shape legend: T tokens in a batch, K top-k, H hidden size, R rows of one expert, S rows of all experts one below the
other, I inputs of a site.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..calibration.moments import SiteMoments, scaled
from ..core.device import on_cuda
from ..models.adapter import Role, Site
from ..models.block import Block
from ..quantize.metric import swiglu_slopes


@dataclass(frozen=True)
class Read:
    """What one entry of a site reads in a batch."""

    # int64 [R], rising.
    tokens: torch.Tensor
    # [R, I]
    rows: torch.Tensor
    # fp32 [R]: how many times a row counts that its token counts once; None: once.
    times: torch.Tensor | None = None

    @classmethod
    def by(cls, site: Site, tokens: torch.Tensor, rows_RI: torch.Tensor, scale_R1: torch.Tensor | None) -> "Read":
        """`scale_R1` multiplies the expert's outputs."""
        if scale_R1 is None:
            return cls(tokens, rows_RI)
        if site.adds_to_residual:
            return cls(tokens, (rows_RI * scale_R1).to(rows_RI.dtype))
        return cls(tokens, rows_RI, scale_R1[:, 0].float().square())

    def weighed(self, weight_T: torch.Tensor) -> torch.Tensor:
        """How much each row counts, fp32 [R], given how much each token does."""
        weight_R = weight_T[self.tokens]
        return weight_R if self.times is None else weight_R * self.times


# By (site key, expert); experts rise.
SiteRows = Mapping[tuple[str, int], Read]


@dataclass(frozen=True)
class Beside:
    """The reference stream beside a batch of the quantized one."""

    # bool [T]: tokens with the same route in both streams.
    alike: torch.Tensor
    # The inputs of inner sites in the reference stream.
    rows: SiteRows
    # fp32 [T, H]: the miss where the half ends; None where no site adds to the residual stream.
    missed: torch.Tensor | None


def add_batch(
    target: Block,
    sites: Sequence[Site],
    moments: Mapping[str, SiteMoments],
    rows: SiteRows,
    weights: Mapping[str, torch.Tensor],
    beside: Beside | None,
) -> None:
    """Adds the inputs `rows` of the quantized stream to the moments of `sites`, and misses where there is a stream
    beside it. `weights`: by site key, fp32 [T]. All are on one device."""
    for site in sites:
        ours = _of_site(rows, site)
        if not ours:
            continue
        of_site, weight_T = moments[site.key], weights[site.key]
        if of_site.slope_EPP is not None:
            for expert, read in ours.items():
                slopes, weight_R = swiglu_slopes(read.rows, target.joined(site.members[expert])), read.weighed(weight_T)
                if on_cuda(weight_T):
                    of_site.add_slopes(expert, scaled(slopes, weight_R, read.rows.dtype))
                else:
                    of_site.add_slopes(expert, slopes, weight_R)
        if on_cuda(weight_T):
            _add_together(site, of_site, ours, weight_T, beside)
        else:
            _add_one_by_one(site, of_site, ours, weight_T, beside)


def _of_site(rows: SiteRows, site: Site) -> dict[int, Read]:
    return {expert: given for (key, expert), given in rows.items() if key == site.key}


def _add_one_by_one(
    site: Site,
    moments: SiteMoments,
    ours: Mapping[int, Read],
    weight_T: torch.Tensor,
    beside: Beside | None,
) -> None:
    everywhere = site.reads_norm is not None
    for expert, read in ours.items():
        weight_R = read.weighed(weight_T)
        moments.add(expert, read.rows, weight_R)
        if beside is None:
            continue
        kept = slice(None) if everywhere else beside.alike[read.tokens]
        x_RI = read.rows[kept]
        if site.adds_to_residual:
            assert beside.missed is not None
            miss = beside.missed[read.tokens[kept]]
        elif (site.key, expert) in beside.rows:
            theirs = beside.rows[site.key, expert]
            miss = theirs.rows[slice(None) if everywhere else beside.alike[theirs.tokens]].float() - x_RI.float()
        else:
            continue
        moments.add_miss(expert, x_RI, miss, weight_R[kept])


def _add_together(
    site: Site,
    moments: SiteMoments,
    ours: Mapping[int, Read],
    weight_T: torch.Tensor,
    beside: Beside | None,
) -> None:
    counts = [len(ours[expert].tokens) if expert in ours else 0 for expert in range(len(site.members))]
    joined = _joined(ours)
    token_S, x_SI, weight_S = joined.tokens, joined.rows, joined.weighed(weight_T)
    scaled_SI = scaled(x_SI, weight_S, x_SI.dtype)
    moments.add_all(counts, scaled_SI, weight_S)
    if beside is None:
        return
    if site.reads_norm is None:
        weight_S = weight_S * beside.alike[token_S]
    if site.adds_to_residual:
        assert beside.missed is not None
        miss = beside.missed[token_S]
    elif theirs := _of_site(beside.rows, site):
        joined = _joined(theirs)
        their_x_SI = joined.rows
        if site.role is Role.EXPERT:
            their_x_SI = their_x_SI[_same_place(token_S, joined.tokens)]
        miss = their_x_SI.float() - x_SI.float()
    else:
        return
    moments.add_all_misses(counts, scaled_SI, scaled(miss, weight_S, x_SI.dtype))


def _joined(rows: Mapping[int, Read]) -> Read:
    """All experts' rows, one expert's below the other's."""
    reads = list(rows.values())
    if len(reads) == 1:
        return reads[0]
    times = [read.times for read in reads if read.times is not None]
    return Read(
        torch.cat([read.tokens for read in reads]),
        torch.cat([read.rows for read in reads]),
        torch.cat(times) if times else None,
    )


def _same_place(token_S: torch.Tensor, their_token_S: torch.Tensor) -> torch.Tensor:
    """For each of our rows the place of the same token's among theirs; of its n-th expert, where a token has several.
    Both have every token equally often, and experts rise."""
    by_token_S = torch.argsort(token_S, stable=True)
    return torch.argsort(their_token_S, stable=True)[torch.argsort(by_token_S)]
