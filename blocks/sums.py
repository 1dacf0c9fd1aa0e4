"""What one batch of the two streams adds to the statistics of a half's sites: second moments, misses and slopes.

A miss is the reference stream minus the quantized stream, for the same token. Tokens whose routes differ are left out,
but where a site reads a norm: the router decides the routes, so it and whatever comes before it get all tokens.

A CPU goes expert by expert, and picks rows. A GPU takes the rows of all experts as one, because every operation is a
launch, and gives left-out tokens the weight zero, because picking makes the host wait. Both give the same sums, but for
the rounding that `scaled` tells of.

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

# (site key, expert) -> (token numbers [R] rising, rows [R, I]); experts rise.
SiteRows = Mapping[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]


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
            for expert, (tokens, x_RI) in ours.items():
                slopes, weight_R = swiglu_slopes(x_RI, target.joined(site.members[expert])), weight_T[tokens]
                if on_cuda(weight_T):
                    of_site.add_slopes(expert, scaled(slopes, weight_R, x_RI.dtype))
                else:
                    of_site.add_slopes(expert, slopes, weight_R)
        if on_cuda(weight_T):
            _add_together(site, of_site, ours, weight_T, beside)
        else:
            _add_one_by_one(site, of_site, ours, weight_T, beside)


def _of_site(rows: SiteRows, site: Site) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    return {expert: given for (key, expert), given in rows.items() if key == site.key}


def _add_one_by_one(
    site: Site,
    moments: SiteMoments,
    ours: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    weight_T: torch.Tensor,
    beside: Beside | None,
) -> None:
    everywhere = site.reads_norm is not None
    for expert, (tokens, x_RI) in ours.items():
        moments.add(expert, x_RI, weight_T[tokens])
        if beside is None:
            continue
        kept = slice(None) if everywhere else beside.alike[tokens]
        if site.adds_to_residual:
            assert beside.missed is not None
            miss = beside.missed[tokens[kept]]
        elif (site.key, expert) in beside.rows:
            their_tokens, their_x = beside.rows[site.key, expert]
            theirs = their_x[slice(None) if everywhere else beside.alike[their_tokens]]
            miss = theirs.float() - x_RI[kept].float()
        else:
            continue
        moments.add_miss(expert, x_RI[kept], miss, weight_T[tokens[kept]])


def _add_together(
    site: Site,
    moments: SiteMoments,
    ours: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    weight_T: torch.Tensor,
    beside: Beside | None,
) -> None:
    counts = [len(ours[expert][0]) if expert in ours else 0 for expert in range(len(site.members))]
    token_S, x_SI = _joined(ours)
    weight_S = weight_T[token_S]
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
        their_token_S, their_x_SI = _joined(theirs)
        if site.role is Role.EXPERT:
            their_x_SI = their_x_SI[_same_place(token_S, their_token_S)]
        miss = their_x_SI.float() - x_SI.float()
    else:
        return
    moments.add_all_misses(counts, scaled_SI, scaled(miss, weight_S, x_SI.dtype))


def _joined(rows: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, given = zip(*rows.values(), strict=True)
    return (tokens[0], given[0]) if len(rows) == 1 else (torch.cat(tokens), torch.cat(given))


def _same_place(token_S: torch.Tensor, their_token_S: torch.Tensor) -> torch.Tensor:
    """For each of our rows the place of the same token's among theirs; of its n-th expert, where a token has several.
    Both have every token equally often, and experts rise."""
    by_token_S = torch.argsort(token_S, stable=True)
    return torch.argsort(their_token_S, stable=True)[torch.argsort(by_token_S)]
