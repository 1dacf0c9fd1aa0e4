"""Prices against transformers: one unit's rounded weights put into the whole model, KL from whole logits in fp64."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from babies import make_model
from inputs import RECIPE
from onecard.bits.fitting import menu_of, price_model, priced_units, resolved
from onecard.bits.pricing import Prices, identity_of, priced_rows
from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.model import Model, open_source
from onecard.core.device import Compute
from onecard.core.errors import InputError
from onecard.core.recipe_groups import KEEP
from onecard.core.rows import Row, Step, Unwatched
from onecard.core.scheme import Scheme
from onecard.models.block import Block
from onecard.models.walk import HiddenRows
from onecard.recipe import Recipe
from walking import cpu_walk

CPU = torch.device("cpu")
FIT = {
    "bits": "fit",
    "budget_gb": 1.0,
    "fit_schemes": ["int4 group 32", "int8 group 32", "keep"],
    "price_rows": 2,
    "price_row_tokens": 20,
    "quantize_roles": ["expert", "shared_expert", "mlp", "attention"],
    "sequential": "halves",
}


def made(**changes: Any) -> Recipe:
    return Recipe.model_validate(RECIPE | FIT | changes)


def some_rows(count: int = 6, length: int = 24) -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, 200, (count, length), generator=generator)
    return [Row(f"d{n}", "plain", row) for n, row in enumerate(tokens)]


def taken(model: Model, recipe: Recipe, folder: Path, step: Step | None = None) -> Prices:
    return price_model(cpu_walk(model, recipe.batch_tokens, step=step), model, recipe, some_rows(), folder)


def stored(whole: Any, module: str) -> torch.Tensor:
    """The weight [out, in] of a canonical module inside a transformers model, as a view."""
    number, local = re.search(r"layers\.(\d+)\.(.*)", module).groups()  # type: ignore[union-attr]
    local = local.replace("block_sparse_moe", "mlp")
    text = {name: p.data for name, p in whole.named_parameters() if "vision" not in name}
    expert = re.fullmatch(r"(.*experts)\.(\d+)\.(gate|up|down)_proj", local)
    if expert is None:
        (found,) = [p for name, p in text.items() if name.endswith(f"layers.{number}.{local}.weight")]
        return found
    stem, which, part = expert.groups()
    fused = "down_proj" if part == "down" else "gate_up_proj"
    (found,) = [p[int(which)] for name, p in text.items() if name.endswith(f"layers.{number}.{stem}.{fused}")]
    found = found.T if "feed_forward" in local else found  # Llama 4 keeps [in, out]
    return found if part == "down" else found.chunk(2)[part == "up"]


def log_probabilities(whole: Any, rows: list[Row]) -> torch.Tensor:
    with torch.inference_mode():
        logits = [whole(input_ids=row.tokens[None]).logits[0, :-1] for row in rows]
    return torch.log_softmax(torch.cat(logits).double(), -1)


def rounded_to_nearest(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    half = 2 ** (scheme.bits - 1)
    grouped = weight.unflatten(-1, (-1, scheme.group_size))
    scale = (grouped.abs().amax(-1, keepdim=True) / half).bfloat16().float()
    return ((grouped / scale).round().clamp(-half, half - 1) * scale).flatten(-2).bfloat16().float()


@pytest.mark.parametrize(("family", "method"), [("scout", "rtn"), ("qwen3", "rtn"), ("qwen3", "balanced")])
def test_prices_are_those_of_the_whole_model(
    baby: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, method: str
) -> None:
    model, recipe = open_source(str(baby(family))), made(method=method)
    codes: dict[tuple[str, Scheme], torch.Tensor] = {}
    read: dict[str, list[Row]] = {}
    exchanged, real_embed = Block.exchanged, HiddenRows.embed

    def seen(block: Block, rounded: Block, names: list[str]) -> AbstractContextManager[None]:
        """A unit is exchanged for its rounded weights once a width, in the order of the menu."""
        scheme = next(scheme for scheme in menu_of(recipe) if (names[0], scheme) not in codes)
        codes.update({(name, scheme): rounded.weight(name).clone() for name in names})
        return exchanged(block, rounded, names)

    def embed(hidden: HiddenRows, *streams: str) -> None:
        read[streams[0]] = hidden.rows
        real_embed(hidden, *streams)

    monkeypatch.setattr(Block, "exchanged", seen)
    monkeypatch.setattr(HiddenRows, "embed", embed)
    prices = taken(model, recipe, tmp_path)

    # No unit is priced on the rows that gave the statistics for its rounding.
    ours, others = read["reference"], read["quantized"]
    assert [len(row.tokens) for row in ours] == [20, 20]
    assert {row.document for row in ours} | {row.document for row in others} == {f"d{n}" for n in range(6)}
    assert not {row.document for row in ours} & {row.document for row in others}
    assert (prices.rows, prices.tokens) == (2, 40)

    whole = make_model(family, 2)
    reference = log_probabilities(whole, ours)

    def kl(modules: list[str], scheme: Scheme) -> float:
        """KL of the whole model with these modules rounded."""
        before = [stored(whole, module).clone() for module in modules]
        for module in modules:
            stored(whole, module).copy_(codes[module, scheme])
        found = log_probabilities(whole, ours)
        for module, weight in zip(modules, before, strict=True):
            if method == "rtn":
                assert torch.equal(codes[module, scheme], rounded_to_nearest(weight, scheme))
            stored(whole, module).copy_(weight)
        return float((reference.exp() * (reference - found)).sum(-1).mean())

    units = priced_units(model.adapter, recipe)
    assert [unit.unit for unit in prices.units] == list(units)
    for unit in prices.units:
        for scheme in menu_of(recipe):
            # Log-normalisers near 5 are rounded to 5e-7 in fp32, and 38 tokens are averaged.
            expected = pytest.approx(kl(units[unit.unit], scheme), rel=1e-4, abs=2e-7)
            assert unit.at(scheme).kl_nats == expected, (unit.unit, scheme)
        assert unit.at(None).kl_nats == unit.at(None).error == 0
        assert unit.at(menu_of(recipe)[0]).error > unit.at(menu_of(recipe)[1]).error > 0
    everything = [module for modules in units.values() for module in modules]
    for scheme in menu_of(recipe):
        assert prices.together_nats[str(scheme)][0] == pytest.approx(kl(everything, scheme), rel=1e-4, abs=2e-7)


@pytest.mark.parametrize("family", ["scout", "qwen3", "mixtral"])
def test_widths_have_the_bytes_that_the_plan_lays_out(baby: Callable[..., Path], family: str) -> None:
    from onecard.bits.fitting import bytes_of_units

    model, recipe = open_source(str(baby(family))), made()
    units, menu = priced_units(model.adapter, recipe), menu_of(recipe)
    sizes = bytes_of_units(model, units, menu)
    for width in (*menu, None):
        if width is None:  # a plan quantizes something: the first unit only
            widths = {unit: menu[0] if unit == next(iter(units)) else None for unit in units}
        else:
            widths = dict.fromkeys(units, width)
        plan = plan_for(model, resolved(recipe, units, widths))
        found = dict.fromkeys(units, 0)
        for _, tensor in plan.tensors():
            module = tensor.name.rpartition(".")[0]
            for unit, modules in units.items():
                found[unit] += tensor.nbytes * (module in modules)
        assert found == {unit: sizes[unit, widths[unit]] for unit in units}


class Begun(Unwatched):
    """A Step that stops the pass where `stop` begins, and remembers the parts of a block that it saw, in order."""

    def __init__(self, stop: tuple[str, int | None] | None = None) -> None:
        self.stop = stop
        self.seen: list[tuple[str, int]] = []

    def begin(self, label: str, block: int | None = None) -> None:
        if (label, block) == self.stop:
            raise KeyboardInterrupt
        if block is not None:
            self.seen.append((label, block))


@pytest.mark.parametrize("where", ["streams", "round", "head"])
def test_a_pass_that_was_stopped_goes_on(baby: Callable[..., Path], tmp_path: Path, where: str) -> None:
    model, recipe = open_source(str(baby("qwen3"))), made(method="balanced")
    expected = taken(model, recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        taken(model, recipe, tmp_path / "work", Begun((f"price: {where}", None if where == "head" else 1)))
    again = Begun()
    assert taken(model, recipe, tmp_path / "work", again) == expected
    assert {block for _, block in again.seen} == (set() if where == "head" else {1})
    # A block has one pass for statistics: the last block is priced once.
    assert again.seen.count(("price: statistics", 1)) == (where != "head")


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 5), st.integers(2, 30))
def test_rows_that_price_give_no_statistics(pictured: list[bool], count: int, tokens: int) -> None:
    rows = [
        Row(f"d{n}", "plain", torch.arange(24), torch.zeros(1, 3, 4, 4) if picture else None)
        for n, picture in enumerate(pictured)
    ]
    recipe = made(price_rows=count, price_row_tokens=tokens)
    plain = pictured.count(False)
    if plain < 2:
        with pytest.raises(InputError, match=f"{plain} rows"):
            priced_rows(rows, recipe)
        return
    ours, others = priced_rows(rows, recipe)
    assert sorted(r.document for r in ours + others) == sorted(r.document for r in rows)
    assert 1 <= len(ours) == min(count, plain // 2)
    assert all(row.pixels is None and len(row.tokens) == min(24, tokens) for row in ours)
    assert all(len(row.tokens) == 24 for row in others)


def test_prices_are_of_one_model_recipe_and_texts(baby: Callable[..., Path]) -> None:
    """The identity names everything that changes a price. Budget, searches and `keep` don't, and need no new pass."""
    model, rows = open_source(str(baby("qwen3"))), some_rows()

    def of(recipe: Recipe, source: Model = model, texts: list[Row] = rows) -> dict[str, str]:
        return identity_of(source, recipe, texts, Compute(CPU, torch.float32, recipe.batch_tokens))

    same = of(made())
    for changes in ({"budget_gb": 2.0}, {"tabu_moves": 7, "restarts": 1}, {"evaluation_rows": 3}):
        assert of(made(**changes)) == same, changes
    assert of(made(fit_schemes=[w for w in FIT["fit_schemes"] if w != KEEP])) == same  # type: ignore[attr-defined]
    other = open_source(str(baby("qwen3", 3)))
    different = [
        of(made(), other),
        of(made(), model, rows[1:]),
        *(
            of(made(**changes))
            for changes in (
                {"fit_schemes": ["int4 group 32"]},
                {"price_rows": 1},
                {"price_row_tokens": 9},
                {"damping": 0.02},
                {"method": "rtn"},
                {"shrinkage": 0.4},
                {"quantize_roles": ["expert"]},
                {"token_weighting": "none"},
                {"keep_modules": ["*.0.*"]},
                {"schemes": {"attention": "keep"}},
            )
        ),
    ]
    for identity in different:
        assert identity != same
        assert sum(identity[key] != same[key] for key in same) <= 2
