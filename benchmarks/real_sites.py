"""What a choice of the quantizer does to single matrices of the real model, on texts like calibration and on others.

    python benchmarks/real.py run --method fast --group 64 --choice          # gives the quantized stream
    python benchmarks/real_sites.py collect --job onecard-fast-g64           # moments of both streams, by kind of text
    python benchmarks/real_sites.py damping 0.01:0 0.1:0 0.1:0.1             # GPTQ: damping:correlation_damping
    python benchmarks/real_sites.py correction 1 10 100                      # the reference correction's strength

A run of the whole model takes minutes; this takes seconds a choice, and tells sites and kinds of text apart. `collect`
runs the dense form twice, as published and with the job's weights, over calibration rows and the choice rows, and keeps
the moments of both streams at the sites of some layers (build/real/sites.pt, 3 GB). `damping` quantizes anew from the
moments of few or of many calibration rows, and measures tr(E S E^T) by the moments S of each kind. `correction` aims
the weights as they were and measures what is left of the miss: of the site's output for q, k, v, gate and up, of the
rows that leave the half for o and down. All figures are relative to the first line; over sites and layers, and over the
kinds of home and of away, they are geometric means.

A line is a hint. What it promises has to be shown by `real.py`: the correction's errors pass through all later layers.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

from onecard.checkpoint.model import open_model  # noqa: E402
from onecard.core.method import PRESETS, Method  # noqa: E402
from onecard.core.scheme import Scheme  # noqa: E402
from onecard.quantize.site import quantize_batch  # noqa: E402
from real_model import documents, made, mixture  # noqa: E402

# Site -> the linear modules that read the same input.
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
ENDS = {"o": "middle", "down": "out"}
# The first rows: as many as `fast` would take at eight rows an input, and more.
FEW, MANY = "9 rows", "40 rows"
CALIBRATION = {FEW: slice(0, 9), MANY: slice(0, 40)}
LAYERS = (1, 5, 10, 16, 22)
EVERY = 4
GROUP = 64
Moments = dict[tuple[str, int, str, str], torch.Tensor]


class Streams:
    """The model as published and as a job left it, cut after the last layer that is looked at."""

    def __init__(self, build: Path, job: str) -> None:
        dense = build / "model" / "dense"
        self.models = {
            which: AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32) for which in ("published", "job")
        }
        checkpoint = open_model(str(build / "jobs" / job / "checkpoint"))
        held = self.models["job"].state_dict()
        for name in mixture.linear_weights(self.models["job"].config):
            parts = [checkpoint.source.dense(part, torch.float32) for part in mixture.mixture_names(name)]
            held[name].copy_(mixture.dense_weight(name, parts))
        self.seen: dict[tuple[str, int, str], torch.Tensor] = {}
        for which, model in self.models.items():
            model.model.layers = model.model.layers[: max(LAYERS) + 1]
            for number in LAYERS:
                layer = model.model.layers[number]
                for site, names in SITES.items():
                    layer.get_submodule(names[0]).register_forward_pre_hook(self._keep(which, number, site))
                layer.post_attention_layernorm.register_forward_pre_hook(self._keep(which, number, "middle"))
                layer.register_forward_hook(self._keep(which, number, "out"))

    def _keep(self, which: str, layer: int, place: str) -> Callable[..., None]:
        def keep(_: object, given: tuple[torch.Tensor, ...], out: object = None) -> None:
            found = given[0] if out is None else out[0] if isinstance(out, tuple) else out
            self.seen[which, layer, place] = found.flatten(0, -2)

        return keep

    def add(self, kind: str, tokens: torch.Tensor, sums: Moments, share: float) -> None:
        """A row's part of the kind's moments: S of the job's inputs, R of the published ones, D of what the former miss
        with the former, M of what the half's rows miss, and its size E."""
        for model in self.models.values():
            model.model(tokens[None])
        for layer in LAYERS:
            for site in SITES:
                ours, theirs = self.seen["job", layer, site], self.seen["published", layer, site]
                pairs = {"S": (ours, ours), "R": (theirs, theirs), "D": (theirs - ours, ours)}
                if site in ENDS:
                    missed = self.seen["published", layer, ENDS[site]] - self.seen["job", layer, ENDS[site]]
                    pairs |= {"M": (missed, ours), "E": (missed, missed)}
                for what, (left, right) in pairs.items():
                    key = (kind, layer, site, what)
                    if key not in sums:
                        sums[key] = torch.zeros(left.shape[1], right.shape[1])
                    sums[key].addmm_(left.T, right, alpha=share)

    def weights(self, which: str) -> dict[tuple[int, str], torch.Tensor]:
        """[O, I] of each site."""
        layers = self.models[which].model.layers
        return {
            (number, site): torch.cat([layers[number].get_submodule(name).weight.detach() for name in names])
            for number in LAYERS
            for site, names in SITES.items()
        }


def collect(build: Path, job: str) -> None:
    streams, sums = Streams(build, job), Moments()
    rows = load_file(build / "inputs" / "dense" / "rows.safetensors")["rows"]
    of_kind = {name: list(rows[cut]) for name, cut in CALIBRATION.items()}
    for row in made.evaluation_rows(build, "choice", EVERY):
        of_kind.setdefault(row.kind or "", []).append(row.tokens)
    for kind, those in of_kind.items():
        for tokens in those:
            streams.add(kind, tokens, sums, 1 / sum(map(len, those)))
        print(kind, len(those), flush=True)
    kept = {"moments": sums} | {which: streams.weights(which) for which in streams.models}
    torch.save(kept, build / "sites.pt")


class Kept:
    """What `collect` found."""

    def __init__(self, build: Path) -> None:
        read = torch.load(build / "sites.pt", weights_only=True)
        self.moments: Moments = read["moments"]
        self.published, self.job = read["published"], read["job"]
        self.kinds = (*documents.HOME, *documents.AWAY)

    def size(self, kind: str, layer: int, site: str) -> float:
        """The mean square of the published output."""
        w = self.published[layer, site]
        return float(((w @ self.moments[kind, layer, site, "R"]) * w).sum())

    def rounding(self, kind: str, layer: int, site: str, q_OI: torch.Tensor) -> float:
        """What weights `q_OI` change of the output, of the mean square of it."""
        error = self.published[layer, site] - q_OI
        moved = float(((error @ self.moments[kind, layer, site, "S"]) * error).sum())
        return moved / self.size(kind, layer, site)

    def missed(self, kind: str, layer: int, site: str, q_OI: torch.Tensor) -> float:
        """What weights `q_OI` leave of the miss, of the mean square of the published output."""
        s, w = self.moments[kind, layer, site, "S"], self.published[layer, site]
        size = self.size(kind, layer, site)
        if site in ENDS:
            change = self.job[layer, site] - q_OI
            now = float(self.moments[kind, layer, site, "E"].trace())
            found = now + float(((change @ s + 2 * self.moments[kind, layer, site, "M"]) * change).sum())
        else:
            crossed = (w @ (self.moments[kind, layer, site, "D"] + s)) * q_OI
            found = size - 2 * float(crossed.sum()) + float(((q_OI @ s) * q_OI).sum())
        return found / size

    def aimed(self, rows: str, layer: int, site: str, strength: float) -> torch.Tensor:
        """The published weights, aimed with the ridge of quantize/correction.py; strength 0: as they are."""
        w, s = self.published[layer, site], self.moments[rows, layer, site, "S"].double()
        if not strength:
            return w
        inputs = len(s) // (mixture.EXPERTS if site == "down" else 1)  # of a matrix of the mixture
        ridge = strength * inputs / (documents.ROW_TOKENS * CALIBRATION[rows].stop)
        if site in ENDS:  # the miss that the half would have with the published weights
            right = self.moments[rows, layer, site, "M"].double() + (self.job[layer, site] - w).double() @ s
        else:
            right = w.double() @ self.moments[rows, layer, site, "D"].double()
        ridged = s + ridge * s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)
        return w + torch.linalg.solve(ridged, right, left=False).float()

    def rounded(self, rows: str, layer: int, site: str, damping: float, correlation: float) -> torch.Tensor:
        keys = {key: value for key, value in PRESETS["fast"].items() if key in Method.model_fields}
        method = Method(method="fast", **keys, damping=damping, correlation_damping=correlation)
        w, s = self.published[layer, site][None], self.moments[rows, layer, site, "S"][None]
        found = quantize_batch(w.clone(), s.clone(), Scheme(bits=4, group_size=GROUP), method, torch.bfloat16)
        return found.weight.dequantize(torch.float32)[0]

    def errors(self, verb: str, choice: str, rows: str, sites: tuple[str, ...]) -> dict[str, list[float]]:
        """By kind, the error of each layer and site."""
        errors: dict[str, list[float]] = {kind: [] for kind in self.kinds}
        for layer in LAYERS:
            for site in sites:
                if verb == "damping":
                    damping, _, correlation = choice.partition(":")
                    made_of = self.rounded(rows, layer, site, float(damping), float(correlation or 0))
                else:
                    made_of = self.aimed(rows, layer, site, float(choice))
                measure = self.rounding if verb == "damping" else self.missed
                for kind, found in errors.items():
                    found.append(measure(kind, layer, site, made_of))
        return errors


def line(name: str, errors: dict[str, list[float]], base: dict[str, list[float]]) -> None:
    ratio = {
        kind: math.prod(a / b for a, b in zip(errors[kind], base[kind], strict=True)) ** (1 / len(base[kind]))
        for kind in base
    }
    home, away = (
        math.prod(ratio[kind] for kind in kinds) ** (1 / len(kinds)) for kinds in (documents.HOME, documents.AWAY)
    )
    cells = [name, f"{home:.3f}", f"{away:.3f}", *(f"{ratio[kind]:.3f}" for kind in documents.AWAY)]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE.parent / "build" / "real")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("collect").add_argument("--job", default=f"onecard-fast-g{GROUP}")
    for verb in ("damping", "correction"):
        verbs.add_parser(verb).add_argument("choice", nargs="+")
    given = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    if given.verb == "collect":
        collect(given.build, given.job)
        return
    kept = Kept(given.build)
    print("| | home | away | " + " | ".join(documents.AWAY) + " |\n" + "|---" * (3 + len(documents.AWAY)) + "|")
    # Rounding is alike at all sites. The correction has another aim at each.
    for sites in [tuple(SITES)] if given.verb == "damping" else [(site,) for site in SITES]:
        base = None
        for rows in CALIBRATION:
            for choice in given.choice:
                errors = kept.errors(given.verb, choice, rows, sites)
                base = base or errors
                line(f"{sites[0] if len(sites) == 1 else 'all'}, {rows}, {choice}", errors, base)


if __name__ == "__main__":
    main()
