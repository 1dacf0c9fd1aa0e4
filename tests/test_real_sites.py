"""benchmarks/real_sites.py: what it says of a site is what the rows themselves give."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "peers")]
import real_sites  # noqa: E402

ROWS, INPUTS, OUTPUTS = 50, 8, 6


@pytest.fixture
def streams() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(ROWS, INPUTS, generator=rng) for name in ("published", "moved")}
    missed = torch.randn(ROWS, OUTPUTS, generator=rng)
    weights = {name: torch.randn(OUTPUTS, INPUTS, generator=rng) for name in ("w", "job", "q")}
    return {"theirs": drawn["published"], "ours": drawn["published"] + 0.3 * drawn["moved"], "missed": missed} | weights


@pytest.fixture
def kept(streams: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> real_sites.Kept:
    monkeypatch.setattr(real_sites, "LAYERS", (0,))
    ours, theirs, missed = streams["ours"], streams["theirs"], streams["missed"]
    pairs = {"S": (ours, ours), "R": (theirs, theirs), "D": (theirs - ours, ours), "M": (missed, ours)}
    pairs["E"] = (missed, missed)
    moments = {
        (kind, 0, site, what): left.T @ right / ROWS
        for kind in ("german", real_sites.FEW)
        for site in real_sites.SITES
        for what, (left, right) in pairs.items()
    }
    weights = {
        which: {(0, site): streams[key] for site in real_sites.SITES}
        for which, key in (("published", "w"), ("job", "job"))
    }
    torch.save({"moments": moments} | weights, tmp_path / "sites.pt")
    return real_sites.Kept(tmp_path)


def mean_square(rows: torch.Tensor) -> float:
    return float(rows.square().sum() / ROWS)


def test_errors_are_those_of_the_rows(kept: real_sites.Kept, streams: dict[str, torch.Tensor]) -> None:
    w, q, job, ours, theirs = (streams[name] for name in ("w", "q", "job", "ours", "theirs"))
    size = mean_square(theirs @ w.T)
    assert kept.rounding("german", 0, "qkv", q) == pytest.approx(mean_square(ours @ (w - q).T) / size, rel=1e-4)
    left = mean_square(theirs @ w.T - ours @ q.T) / size
    assert kept.missed("german", 0, "gate_up", q) == pytest.approx(left, rel=1e-4)
    left = mean_square(streams["missed"] + ours @ (job - q).T) / size
    assert kept.missed("german", 0, "down", q) == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize("site", real_sites.SITES)
def test_aiming_lowers_the_miss_of_its_own_rows(
    kept: real_sites.Kept, streams: dict[str, torch.Tensor], site: str
) -> None:
    """With hardly a ridge nothing nearby is better; no strength leaves the weights alone."""
    assert kept.aimed(real_sites.FEW, 0, site, 0.0) is kept.published[0, site]
    aimed = kept.aimed(real_sites.FEW, 0, site, 1e-3)
    best = kept.missed(real_sites.FEW, 0, site, aimed)
    assert best < 0.999 * kept.missed(real_sites.FEW, 0, site, streams["w"])
    rng = torch.Generator().manual_seed(1)
    for _ in range(20):
        nearby = aimed + 0.05 * torch.randn(aimed.shape, generator=rng)
        assert kept.missed(real_sites.FEW, 0, site, nearby) > best
