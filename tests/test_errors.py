"""Errors of blocks, halves, units and experts against both whole models, run by hand.

The slow versions load the babies with transformers, catch the inputs and outputs of layers, and write the formulas out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from babies import changed_copy, noise
from onecard.checkpoint.activations import Activations
from onecard.checkpoint.loading import load_with_transformers
from onecard.checkpoint.model import open_model
from onecard.core.rows import Row, batches
from onecard.eval import errors
from onecard.eval.errors import WORST_EXPERTS, places_of, standing_out
from onecard.eval.twin import twin_walk
from onecard.models.adapter import read
from walking import cpu_walk

FAMILIES = ["scout", "maverick", "llama4-text", "qwen3"]
Found = dict[str, Any]


def make_rows(lengths: list[int]) -> list[Row]:
    generator = torch.Generator().manual_seed(4)
    return [Row(f"row-{n}", "text", torch.randint(3, 240, (t,), generator=generator)) for n, t in enumerate(lengths)]


ROWS = make_rows([40, 24, 40, 9, 24, 31, 40, 24])


def errors_of(reference: Path, other: Path, folder: Path, rows: list[Row] = ROWS, batch_tokens: int = 90) -> Found:
    walk, opened = cpu_walk(open_model(str(reference)), batch_tokens), open_model(str(other))
    quantized = walk.beside(opened.adapter, opened.source)
    twin = twin_walk(walk, quantized, rows, Activations(folder), with_errors=True)
    assert twin.errors is not None
    return twin.errors.facts({})


# The twin


@dataclass
class Layer:
    """One decoder layer of a whole model on one row: hidden states [T, H] at its entry, between its halves and at its
    exit, and its attention's keyword arguments."""

    module: Any
    entering: torch.Tensor
    middle: torch.Tensor
    leaving: torch.Tensor
    arguments: dict[str, Any]


def layers_of(model: Any, row: Row) -> list[Layer]:
    stack = next(m for name, m in model.named_modules() if name.endswith("layers") and "vision" not in name)
    seen: list[dict[str, Any]] = [{} for _ in stack]
    handles = []
    for layer, own in zip(stack, seen, strict=True):

        def entering(m: Any, args: Any, own: Any = own) -> None:
            own["entering"] = args[0][0]

        def between(m: Any, args: Any, own: Any = own) -> None:
            own["middle"] = args[0][0]

        def leaving(m: Any, args: Any, out: Any, own: Any = own) -> None:
            own["leaving"] = (out[0] if isinstance(out, tuple) else out).reshape(-1, 64)

        def attending(m: Any, args: Any, kwargs: Any, own: Any = own) -> None:
            own["arguments"] = {key: value for key, value in kwargs.items() if key != "hidden_states"}

        handles += [
            layer.register_forward_pre_hook(entering),
            layer.post_attention_layernorm.register_forward_pre_hook(between),
            layer.register_forward_hook(leaving),
            layer.self_attn.register_forward_pre_hook(attending, with_kwargs=True),
        ]
    with torch.inference_mode():
        model(input_ids=row.tokens[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [Layer(module, **own) for module, own in zip(stack, seen, strict=True)]


def feed_forward(layer: Layer) -> Any:
    return layer.module.feed_forward if hasattr(layer.module, "feed_forward") else layer.module.mlp


def after_attention(layer: Layer, other: Any, hidden: torch.Tensor) -> torch.Tensor:
    """`other`'s attention half on a hidden state, with the arguments that `layer`'s got."""
    with torch.inference_mode():
        out, _ = other.self_attn(hidden_states=other.input_layernorm(hidden[None]), **layer.arguments)
    return hidden + out[0]


def after_feed_forward(layer: Layer, middle: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        out = feed_forward(layer)(layer.module.post_attention_layernorm(middle[None]))
    return middle + (out[0] if isinstance(out, tuple) else out).reshape(middle.shape)


def relative(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Root of the mean over tokens of |h' - h|^2 / |h|^2, one token at a time."""
    found = []
    for other, exact in pairs:
        for a, b in zip(other.double(), exact.double(), strict=True):
            found.append(float((a - b).square().sum() / b.square().sum()))
    return float((sum(found) / len(found)) ** 0.5)


def whole_pair(reference: Path, other: Path, rows: list[Row]) -> list[list[tuple[Layer, Layer]]]:
    """By block and row: the layer in both whole models."""
    models = [load_with_transformers(path, torch.float32) for path in (reference, other)]
    by_row = [list(zip(*(layers_of(model, row) for model in models), strict=True)) for row in rows]
    return [list(block) for block in zip(*by_row, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_halves_are_those_of_the_whole_models(
    baby: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    other = changed_copy(baby(family), tmp_path / "other", noise(0.1))
    found = errors_of(baby(family), other, tmp_path / "acts")["blocks"]
    whole = whole_pair(baby(family), other, ROWS)
    assert [entry["block"] for entry in found] == list(range(len(whole)))
    for entry, pairs in zip(found, whole, strict=True):
        hidden = relative([(b.leaving, a.leaving) for a, b in pairs])
        attention = relative([(after_attention(a, b.module, a.entering), a.middle) for a, b in pairs])
        added = relative([(after_feed_forward(b, a.middle), a.leaving) for a, b in pairs])
        assert entry["hidden"] == pytest.approx(hidden, rel=1e-4)
        assert entry["attention"] == pytest.approx(attention, rel=1e-4)
        assert entry["feed_forward"] == pytest.approx(added, rel=1e-4)
        assert min(hidden, attention, added) > 0.005
    assert found[-1]["hidden"] > found[0]["hidden"], "errors pile up"


def unit_of(name: str, block: int) -> str | None:
    """The unit that a stored tensor of a block's matrices belongs to."""
    if f".layers.{block}." not in name or "norm" in name or "vision" in name:
        return None
    local = name.split(f".layers.{block}.")[1]
    if ".experts." in local:
        return local.split(".experts.")[0] + ".experts"
    head, _, leaf = local.removesuffix(".weight").rpartition(".")
    fused = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
    fused |= dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj")
    fused |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
    return f"{head}.{fused.get(leaf, leaf)}"


@pytest.mark.parametrize("family", ["scout", "maverick", "qwen3", "deepseek"])
def test_a_units_error_is_that_of_a_model_with_that_unit_alone_replaced(
    baby: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """With one unit changed, its half adds exactly its error, and no other unit of this block or the next is named."""
    reference = baby(family)
    far = noise(0.2)
    noisy: dict[str, torch.Tensor] = {}

    def remember(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noisy[name] = far(name, tensor)
        return noisy[name]

    found = errors_of(reference, changed_copy(reference, tmp_path / "all", remember), tmp_path / "acts")["blocks"]
    units = {unit for unit in (unit_of(name, 0) for name in noisy) if unit}
    assert len(units) == {"scout": 6, "maverick": 4, "qwen3": 4, "deepseek": 6}[family]
    assert set(found[0]["units"]) == units
    for unit in units:
        alone = changed_copy(
            reference,
            tmp_path / unit,
            lambda name, t, unit=unit: noisy[name] if unit_of(name, 0) == unit else t,
        )
        of_one = errors_of(reference, alone, tmp_path / "acts")["blocks"]
        half, other = ("attention", "feed_forward")[:: 1 if "attn" in unit else -1]
        assert of_one[0]["units"] == {unit: pytest.approx(found[0]["units"][unit], rel=1e-5)}
        assert of_one[0][half] == of_one[0]["units"][unit] > 0.01
        assert of_one[0][other] == 0
        assert (of_one[1]["attention"], of_one[1]["feed_forward"], of_one[1]["units"]) == (0, 0, {})
        assert of_one[1]["hidden"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_against_itself_has_no_error_anywhere(baby: Callable[..., Path], tmp_path: Path, family: str) -> None:
    found = errors_of(baby(family), baby(family), tmp_path / "acts")
    for block in found["blocks"]:
        assert (block["hidden"], block["attention"], block["feed_forward"], block["units"]) == (0, 0, 0, {})
    assert found["experts"]
    for expert in found["experts"]:
        assert (expert["weight_error"], expert["score"]) == (0, 0)
        assert expert["weight_gain"] == pytest.approx(1)
        assert expert["output_error"] == (0 if expert["rows"] else None)


def test_halves_and_units_of_a_sample_of_the_rows(
    baby: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With long texts only every n-th row goes through the units; hidden states are compared on all rows."""
    monkeypatch.setattr(errors, "LEAST_TOKENS", 80)
    other = changed_copy(baby("qwen3"), tmp_path / "other", noise(0.1))
    found = errors_of(baby("qwen3"), other, tmp_path / "acts")["blocks"]
    whole = whole_pair(baby("qwen3"), other, ROWS)
    for entry, pairs in zip(found, whole, strict=True):
        sampled = pairs[::3]  # 232 tokens, about 80 wanted
        assert entry["hidden"] == pytest.approx(relative([(b.leaving, a.leaving) for a, b in pairs]), rel=1e-4)
        added = relative([(after_feed_forward(b, a.middle), a.leaving) for a, b in sampled])
        assert entry["feed_forward"] == pytest.approx(added, rel=1e-4)


def test_a_sample_is_every_so_manieth_row() -> None:
    rows = make_rows([10, 20, 10, 20, 10, 20, 10])
    groups = batches(rows, 40)
    assert groups == [[1, 3], [5], [0, 2, 4, 6]]
    assert places_of(rows, groups, 1000) == [[0, 1], [0], [0, 1, 2, 3]]
    assert places_of(rows, groups, 50) == [[], [], [0, 1, 2, 3]]
    assert places_of(rows, groups, 33) == [[1], [], [0, 3]]
    assert places_of(rows, groups, 1) == [[], [], [0]]
    assert places_of(rows, groups, 0) == [[], [], [0]]


# Experts


@dataclass(frozen=True)
class Routed:
    """The experts of one block on one row: inputs [T, H], and by token the routing weight of each chosen expert."""

    x_TH: torch.Tensor
    chosen: list[dict[int, float]]


def routed(layer: Layer, top_k: int) -> Routed:
    with torch.inference_mode():
        x_TH = layer.module.post_attention_layernorm(layer.middle)
        half = feed_forward(layer)
        llama = hasattr(half, "router")
        logits = F.linear(x_TH, (half.router if llama else half.gate).weight)
        top = logits.topk(top_k)
    weights = torch.sigmoid(top.values) if llama else torch.ones_like(top.values)
    tokens = zip(top.indices.tolist(), weights.tolist(), strict=True)
    return Routed(x_TH, [dict(zip(e, w, strict=True)) for e, w in tokens])


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_experts_are_those_of_the_whole_models(baby: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Weight error over the three matrices; output error on tokens that both models send to the expert; rows in the
    reference. Qwen's outputs are compared before the routing weight, Llama 4's after it, because it scales the input.
    """
    folders = (baby(family), changed_copy(baby(family), tmp_path / "other", noise(0.15)))
    found = errors_of(*folders, tmp_path / "acts")
    models = [open_model(str(folder)) for folder in folders]
    adapter = models[0].adapter
    whole = whole_pair(*folders, ROWS)
    blocks = [0, 1] if family == "scout" else [0]
    assert [(e["block"], e["expert"]) for e in found["experts"]] == [(b, e) for b in blocks for e in range(8)]
    moved = 0
    for entry in found["experts"]:
        block, expert = entry["block"], entry["expert"]
        stem = next(n for s in adapter.sites(block) for n in s.members[-1] if ".experts." in n).rsplit(".", 2)[0]
        names = [f"{stem}.{expert}.{projection}_proj.weight" for projection in ("gate", "up", "down")]
        w, v = ([read(m.adapter, m.source, name).float() for name in names] for m in models)
        missed = sum(float((b - a).double().square().sum()) for a, b in zip(w, v, strict=True))
        assert entry["weight_error"] == pytest.approx(
            (missed / sum(float(a.double().square().sum()) for a in w)) ** 0.5, rel=1e-5
        )
        gains = [float((b * a).double().sum() / a.double().square().sum()) for a, b in zip(w, v, strict=True)]
        assert min(abs(entry["weight_gain"] - gain) for gain in gains) < 1e-5
        rows, missed, size = 0, 0.0, 0.0
        for pair in whole[block]:
            a, b = (routed(layer, adapter.top_k) for layer in pair)
            for token in range(len(a.x_TH)):
                rows += expert in a.chosen[token]
                moved += (expert in a.chosen[token]) != (expert in b.chosen[token])
                if expert in a.chosen[token] and expert in b.chosen[token]:
                    outputs = []
                    for side, (gate, up, down) in ((a, w), (b, v)):
                        x = side.x_TH[token] * side.chosen[token][expert]
                        outputs.append((down @ (F.silu(gate @ x) * (up @ x))).double())
                    missed += float((outputs[1] - outputs[0]).square().sum())
                    size += float(outputs[0].square().sum())
        assert entry["rows"] == rows
        assert entry["output_error"] == (pytest.approx((missed / size) ** 0.5, rel=1e-4) if size else None)
    assert moved > 0, "some tokens go elsewhere in the other model"


def scaled(block: int, expert: int, projection: str, family: str) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Multiplies one matrix of one expert by 1.1, in the layout of the family's files."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        if f".layers.{block}." not in name or ".experts." not in name:
            return tensor
        if family == "qwen3":
            return tensor * 1.1 if f".experts.{expert}.{projection}_proj." in name else tensor
        if projection == "down":
            if name.endswith("down_proj"):
                tensor[expert] *= 1.1
        elif name.endswith("gate_up_proj"):
            half = tensor.shape[-1] // 2
            tensor[expert, :, half * (projection == "up") :][:, :half] *= 1.1
        return tensor

    return change


@pytest.mark.parametrize("family", ["scout", "qwen3"])
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_a_changed_scale_of_one_expert_is_the_worst_expert(
    baby: Callable[..., Path], tmp_path: Path, family: str, projection: str
) -> None:
    """All experts have errors of quantization's size, and the changed one stands far out."""
    small = changed_copy(baby(family), tmp_path / "small", noise(0.05))
    sound = errors_of(baby(family), small, tmp_path / "acts")
    block = 0 if family == "qwen3" else 1
    expert = max((e for e in sound["experts"] if e["block"] == block), key=lambda e: e["rows"])["expert"]
    spoilt = changed_copy(small, tmp_path / "spoilt", scaled(block, expert, projection, family))
    found = errors_of(baby(family), spoilt, tmp_path / "acts")["worst_experts"]
    assert (found[0]["block"], found[0]["expert"]) == (block, expert)
    assert found[0]["weight_gain"] == pytest.approx(1.1, abs=0.01)
    assert found[0]["score"] > 10
    assert found[0]["score"] > 3 * found[1]["score"]
    assert found[0]["score"] > 3 * sound["worst_experts"][0]["score"]


def test_an_expert_without_tokens_has_no_output_error_and_its_weights_are_still_looked_at(
    baby: Callable[..., Path], tmp_path: Path
) -> None:
    rows = make_rows([3])
    sound = errors_of(baby("scout"), baby("scout"), tmp_path / "acts", rows)["experts"]
    starved = next(e for e in sound if e["block"] == 0 and e["rows"] == 0)
    assert sum(e["rows"] for e in sound if e["block"] == 0) == 3
    spoilt = changed_copy(baby("scout"), tmp_path / "spoilt", scaled(0, starved["expert"], "down", "scout"))
    found = errors_of(baby("scout"), spoilt, tmp_path / "acts", rows)["worst_experts"][0]
    assert (found["block"], found["expert"], found["rows"]) == (0, starved["expert"], 0)
    assert found["output_error"] is None
    assert found["weight_error"] > 0.01
    assert found["score"] > 10


def test_the_worst_are_ten_and_in_order_and_say_what_they_were_calibrated_on(
    baby: Callable[..., Path], tmp_path: Path
) -> None:
    walk = cpu_walk(open_model(str(baby("scout"))), 90)
    opened = open_model(str(changed_copy(baby("scout"), tmp_path / "other", noise(0.1))))
    quantized = walk.beside(opened.adapter, opened.source)
    twin = twin_walk(walk, quantized, ROWS, Activations(tmp_path / "acts"), with_errors=True)
    assert twin.errors is not None
    facts = twin.errors.facts({1: [100 + e for e in range(8)]})
    assert {e["calibration_rows"] for e in facts["experts"] if e["block"] == 0} == {None}
    assert [e["calibration_rows"] for e in facts["experts"] if e["block"] == 1] == [100 + e for e in range(8)]
    ranked = [e["score"] for e in facts["worst_experts"]]
    assert len(ranked) == WORST_EXPERTS
    assert ranked == sorted((e["score"] for e in facts["experts"]), reverse=True)[:WORST_EXPERTS]
    assert all(e in facts["experts"] for e in facts["worst_experts"])


def test_standing_out_is_counted_in_robust_deviations() -> None:
    values = [1.0, 1.1, 0.9, 1.2, 0.8, 3.0]
    middle = median(values)
    spread = 1.4826 * median([abs(v - middle) for v in values])
    got = standing_out(values, 0.1)
    assert got == pytest.approx([(v - middle) / spread for v in values])
    # A farther outlier moves neither the median nor the spread, so it stands out more.
    assert standing_out([*values[:-1], 30.0], 0.1)[-1] > 10 * got[-1]
    assert standing_out([1.0, 1.0, 1.0, 1.01], 0.1) == pytest.approx([0, 0, 0, 0.1])
    assert standing_out([0.0] * 4, 0.1) == [0.0] * 4
    assert standing_out([], 0.1) == []
