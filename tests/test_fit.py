"""What a plan adds up: Scout's published arithmetic, weights against planned files, and laws of what fits a card."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import foreign
from hollow import MAVERICK, QWEN3, SCOUT, published, write_hollow
from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.model import Model, open_model
from onecard.checkpoint.plan import Plan
from onecard.core.errors import InputError
from onecard.models.adapter import Adapter
from onecard.models.cache import CacheLayer
from onecard.planner.candidates import candidates_of, entries_of, own_candidate, recipe_candidate
from onecard.planner.cards import CARDS, GIB, Card, find_card
from onecard.planner.changes import Alternative, changes
from onecard.planner.fit import (
    Needs,
    Request,
    bits_that_fit,
    cards_needed,
    fit,
    max_context,
    max_sequences,
    weight_budget_bytes,
)
from onecard.planner.kv import cache_rates
from onecard.planner.sizing import size_up
from onecard.planner.weights import DeviceWeights, cut_problems, device_weights, place_of
from onecard.planner.workspace import Sizes, workspace_bytes
from onecard.recipe import Recipe, load_recipe

H100 = find_card("h100-80gb")[1]


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """A published model's headers."""

    @cache
    def get(name: str) -> Model:
        return open_model(str(write_hollow(tmp_path_factory.mktemp("hollow") / name, published(name))))

    return get


def test_scout_weighs_what_its_parameters_say(hollow: Callable[[str], Model]) -> None:
    """Published: 217.3 GB in bf16, 64.9 with experts and shared expert at int4 group 128, 60.4 with attention too;
    116.2 by hand with 8.125 bits for experts and shared expert."""
    weights = {c.name: c.weights.total_bytes for c in candidates_of(hollow(SCOUT), None)}
    assert weights["as it is"] == 2 * 108_641_793_536
    experts, attention = 48 * 17 * 3 * 5120 * 8192, 48 * (2 * 5120 * 5120 + 2 * 5120 * 1024)
    matrices = 48 * 17 * 3
    # Half a byte for a code, two bytes for the scale of 128 weights, two int64 for each matrix's shape.
    kept = 2 * 108_641_793_536 - 2 * experts
    assert weights["llama4-scout-h100"] == kept + experts // 2 + experts // 64 + 16 * matrices
    more = attention // 2 + attention // 64 - 2 * attention + 16 * 48 * 4
    assert weights["llama4-scout-h100-int4-attention"] == weights["llama4-scout-h100"] + more
    assert [round(count / 1e9, 1) for count in weights.values()] == [217.3, 116.2, 64.9, 60.4]


def test_scout_reaches_what_was_computed_for_it(hollow: Callable[[str], Model]) -> None:
    """With 0.9 of the card and 3 GiB of overhead, as facts have it: 43k uniform, 147k chunk-aware, 318k with fp8."""
    needs = Needs.of(hollow(SCOUT).adapter)
    rules = Request(1).rules
    found = {c.name: c.weights.total_bytes for c in candidates_of(hollow(SCOUT), None)}
    published = {"llama4-scout-h100": (43, 147, 318), "llama4-scout-h100-int4-attention": (65, 235, 495)}
    for name, thousands in published.items():
        room = 79.1 * 0.9 * GIB - 3 * GIB - found[name]
        for said, (kv_dtype, frees) in zip(thousands, (("bf16", False), ("bf16", True), ("fp8", True)), strict=True):
            rates = cache_rates(needs.layers, rules, kv_dtype, 1, frees)
            reach = (room - rates.per_sequence_bytes) / rates.per_token_bytes
            assert reach / 1000 == pytest.approx(said, rel=0.015, abs=1)


@pytest.mark.parametrize("family", ["scout", "maverick", "llama4-text", "qwen3", "deepseek", "mixtral"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"quantize_roles": ["expert", "shared_expert", "mlp", "attention"], "symmetric": False},
        {"schemes": {"attention": "int8 by row"}},
    ],
    ids=["default", "all asymmetric", "mixed"],
)
def test_a_candidate_weighs_what_the_planned_files_hold(
    baby: Callable[..., Path], recipe: Callable[..., Path], family: str, fields: dict[str, object]
) -> None:
    check_against_plan(open_model(str(baby(family))), load_recipe(str(recipe(method="rtn", **fields))))


def planned_weights(adapter: Adapter, plan: Plan) -> DeviceWeights:
    """The bytes of the plan's own tensors, by what becomes of them on several cards."""

    def canonical(name: str) -> str:
        module = name.rpartition(".")[0]
        return f"{module}.weight" if module in plan.schemes else name

    return device_weights(adapter, ((place_of(adapter, canonical(t.name)), t.nbytes) for _, t in plan.tensors()))


def check_against_plan(model: Model, chosen: Recipe) -> None:
    plan = plan_for(model, chosen)
    made = recipe_candidate(model, entries_of(model), chosen)
    assert made.weights == planned_weights(model.adapter, plan)
    assert made.weights.total_bytes == sum(shard.data_bytes for shard in plan.shards)
    assert set(made.widths) == set(plan.widths)


@pytest.mark.parametrize("name", [SCOUT, MAVERICK])
def test_so_does_a_published_models(hollow: Callable[[str], Model], name: str) -> None:
    check_against_plan(hollow(name), load_recipe("rtn-int4"))


@pytest.mark.parametrize(
    ("write", "block"),
    [
        (foreign.gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
        (foreign.nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        (foreign.fp8, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}),
    ],
    ids=["gptq", "nf4", "fp8"],
)
def test_a_finished_checkpoint_weighs_what_its_files_hold(
    baby: Callable[..., Path], tmp_path: Path, write: foreign.Writer, block: dict[str, object]
) -> None:
    packed, plain = foreign.quantized_pair(
        baby("qwen3"), tmp_path, write, lambda name: ".experts." in name, block, torch.bfloat16
    )
    for folder in (packed, plain):
        model = open_model(str(folder))
        stored = 0
        for file in folder.glob("*.safetensors"):
            with safe_open(str(file), "pt") as tensors:
                stored += sum(tensors.get_tensor(key).nbytes for key in tensors.keys())  # noqa: SIM118
        assert own_candidate(model, entries_of(model)).weights.total_bytes == stored
    assert [c.name for c in candidates_of(open_model(str(packed)), None)] == ["as it is"]


def test_transformers_unpacks_what_others_leave_packed(emitted: Callable[[str], tuple[Path, Result]]) -> None:
    model = open_model(str(emitted("scout")[0]))
    own = own_candidate(model, entries_of(model))
    parameters = sum(math.prod(shape) for shape in model.adapter.expected().values())
    assert own.choice(dequantizes=True).weights.total_bytes == 2 * parameters
    assert own.choice(dequantizes=False).weights.total_bytes < 2 * parameters


def test_cards_share_matrices_and_have_the_rest_each(hollow: Callable[[str], Model]) -> None:
    """Each tensor is cut by hand: by rows, columns or KV heads, or copied to every card."""
    model = hollow(SCOUT)
    weights = own_candidate(model, entries_of(model)).weights
    whole = weights.on_card(1)
    assert whole == weights.total_bytes == 2 * 108_641_793_536
    vision = sum(
        2 * math.prod(shape)
        for name, shape in model.adapter.expected().items()
        if name.startswith(("vision_model.", "multi_modal_projector."))
    )
    assert weights.on_card(1, vision=False) == whole - vision
    norms_and_routers = 2 * (97 * 5120 + 48 * 16 * 5120)
    for cards in (2, 4, 8):
        assert weights.on_card(cards) == (whole - vision - norms_and_routers) // cards + vision + norms_and_routers
    # Sixteen cards hold eight KV heads twice.
    kv = 48 * 2 * 2 * 1024 * 5120
    assert weights.on_card(16) == (whole - vision - norms_and_routers - kv) // 16 + kv // 8 + vision + norms_and_routers


def test_what_cannot_be_cut_is_named(hollow: Callable[[str], Model]) -> None:
    model = hollow(SCOUT)
    groups = recipe_candidate(model, entries_of(model), load_recipe("rtn-int4")).groups
    assert cut_problems(model.adapter, 8, groups) == []
    said = cut_problems(model.adapter, 16, groups)
    assert said == ["40 attention heads cannot be shared among 16 cards"]
    odd = cut_problems(model.adapter, 3, groups)
    assert odd[:2] == [
        "40 attention heads cannot be shared among 3 cards",
        "8 KV heads cannot be shared among 3 cards",
    ]
    assert any("are no multiple of its group size 128" in problem for problem in odd)
    narrow = hollow(QWEN3)
    groups = recipe_candidate(narrow, entries_of(narrow), load_recipe("rtn-int4")).groups
    assert cut_problems(narrow.adapter, 4, groups) == [
        "192 inputs of model.layers.0.mlp.experts.0.down_proj on each of 4 cards are no multiple of its group size 128"
    ]
    with pytest.raises(InputError, match="cannot be cut over 3 cards"):
        size_up(model, Request(1024, tensor_parallel=3), H100)


SIZES = Sizes(
    hidden=64,
    vocabulary=1000,
    blocks=4,
    heads=4,
    attention=192,
    halves=((160, 0), (96, 96)),
    top_k=2,
    tile_tokens=4,
    tiles=2,
    positions=100_000,
)
LAYERS = st.sampled_from(
    [
        (CacheLayer("global", 64, None, 2),) * 4,
        (CacheLayer("chunked", 64, 128, 2),) * 3 + (CacheLayer("global", 64, None, 2),),
        (CacheLayer("sliding", 64, 100, 2),) * 4,
        (CacheLayer("latent", 80),) * 4,
    ]
)
ASKED = st.builds(
    Request,
    context=st.integers(1, 100_000),
    sequences=st.integers(1, 300),
    kv_dtype=st.sampled_from(["bf16", "fp8"]),
    batch_tokens=st.sampled_from([None, 64, 4096]),
    frees=st.sampled_from([None, False]),
)


def small_card(count: int) -> Card:
    return Card("small", "Small", 0, count / GIB, 2048)


@given(LAYERS, ASKED, st.integers(1_200_000_000, 9_000_000_000), st.integers(0, 2_000_000_000))
@settings(max_examples=120, deadline=None)
def test_the_most_that_fits_does_and_one_more_does_not(
    layers: tuple[CacheLayer, ...], request: Request, memory: int, weights: int
) -> None:
    needs, card = Needs(layers, SIZES), small_card(memory)
    here = fit(needs, card, weights, request)
    assert here.needed_bytes == here.weight_bytes + here.kv_bytes + here.workspace_bytes
    assert here.fits == (here.needed_bytes <= here.usable_bytes) == (here.left_bytes >= 0)
    longest = max_context(needs, card, weights, request)
    assert longest == 0 or fit(needs, card, weights, replace(request, context=longest)).fits
    assert longest == 100_000 or not fit(needs, card, weights, replace(request, context=longest + 1)).fits
    assert here.fits == (request.context <= longest)
    most = max_sequences(needs, card, weights, request)
    assert most == 0 or fit(needs, card, weights, replace(request, sequences=most)).fits
    assert most == 4096 or not fit(needs, card, weights, replace(request, sequences=most + 1)).fits
    budget = weight_budget_bytes(needs, card, request)
    if budget >= 0:
        assert fit(needs, card, budget, request).left_bytes == 0
        assert not fit(needs, card, budget + 1, request).fits
    assert here.fits == (weights <= budget)


@given(LAYERS, ASKED)
@settings(max_examples=60, deadline=None)
def test_more_is_never_cheaper(layers: tuple[CacheLayer, ...], request: Request) -> None:
    needs = Needs(layers, SIZES)

    def needed(asked: Request) -> int:
        return fit(needs, H100, 0, asked).needed_bytes

    here = needed(request)
    assert here <= needed(replace(request, context=request.context + 1))
    assert here <= needed(replace(request, sequences=request.sequences + 1))
    assert needed(replace(request, kv_dtype="fp8")) <= needed(replace(request, kv_dtype="bf16"))
    assert needed(replace(request, batch_tokens=64)) <= needed(replace(request, batch_tokens=128))
    assert here <= needed(replace(request, images=1))


@given(ASKED, st.integers(1_500_000_000, 6_000_000_000))
@settings(max_examples=80, deadline=None)
def test_changes_fit_and_no_part_of_one_would_do(request: Request, memory: int) -> None:
    needs = Needs((CacheLayer("chunked", 64, 128, 2),) * 3 + (CacheLayer("global", 64, None, 2),), SIZES)
    card = small_card(memory)
    choices = [
        Alternative(name, DeviceWeights(size, 0, 2, 0, 200_000_000))
        for name, size in (("large", 2_000_000_000), ("middle", 1_200_000_000), ("small", 600_000_000))
    ]

    def does(steps: frozenset[str]) -> bool:
        asked, choice = request, choices[0]
        for step in steps:
            if "passes" in step:
                asked = replace(asked, batch_tokens=2048)
            elif "KV" in step:
                asked = replace(asked, kv_dtype="fp8")
            elif "tower" in step:
                asked = replace(asked, vision=False)
            else:
                choice = next(c for c in choices if step == f"recipe {c.name}")
        return fit(needs, card, choice.weights.on_card(1, asked.vision), asked).fits

    if does(frozenset()):
        return
    found = changes(needs, card, choices[0], choices, request)
    offered = [frozenset(change.steps) for change in found]
    assert [change.cost for change in found] == sorted(change.cost for change in found)
    for change, steps in zip(found, offered, strict=True):
        assert change.fit.fits
        assert does(steps)
        parts = chain.from_iterable(combinations(steps, n) for n in range(len(steps)))
        assert not any(does(frozenset(part)) for part in parts)
    # No offer is missed: whatever fits includes an offered recipe or a stronger one.
    steps = ["fp8 KV cache"] * (request.kv_dtype == "bf16") + ["no vision tower", "recipe middle", "recipe small"]
    for part in chain.from_iterable(combinations(steps, n) for n in range(1, len(steps) + 1)):
        recipes = [step for step in part if step.startswith("recipe")]
        if len(recipes) < 2 and does(frozenset(part)):
            loose = frozenset(step.split()[0] for step in part)
            assert any(frozenset(step.split()[0] for step in offer) <= loose for offer in offered), part


def test_workspace_is_its_formula() -> None:
    """Scout's: 8192 tokens of 4 x 5120 residual numbers, attention's 5120 + 2 x 1024 + 5120, a shared MLP of three
    times 8192 and one expert's 16384 + 8192 and its sum's 5120."""
    sizes = Sizes(5120, 202_048, 48, 40, 5120 + 2048 + 5120, ((8192, 8192),), 1, 144, 17, 10_485_760)
    made = workspace_bytes(sizes, Request(1).rules, 131_072, 4)
    assert made.activation_bytes == 2 * 8192 * (4 * 5120 + 12_288 + 3 * 8192 + 16_384 + 8192 + 5120)
    assert made.logit_bytes == 22 * 4 * 202_048
    assert made.total_bytes < 3.1 * GIB, "facts plan with 3 GiB"
    halved = workspace_bytes(sizes, Request(1).rules, 131_072, 4, tensor_parallel=2)
    assert halved.activation_bytes < made.activation_bytes
    assert halved.fixed_bytes > made.fixed_bytes
    assert workspace_bytes(sizes, Request(1).rules, 16, 1).activation_bytes == made.activation_bytes // 512


def test_sizes_are_read_off_the_blocks(hollow: Callable[[str], Model]) -> None:
    scout = Needs.of(hollow(SCOUT).adapter).sizes
    assert scout == Sizes(5120, 202_048, 48, 40, 12_288, ((8192, 8192),), 1, 144, 17, 10_485_760)
    assert set(Needs.of(hollow(MAVERICK).adapter).sizes.halves) == {(16_384, 0), (8192, 8192)}
    assert Needs.of(hollow(QWEN3).adapter).sizes.halves == ((0, 768),)


def test_maverick_fits_no_h100_and_four_hold_it(hollow: Callable[[str], Model]) -> None:
    sizing = size_up(hollow(MAVERICK), Request(32_768), H100)
    assert sizing.fits is False
    assert sizing.cards_needed == 4
    assert sizing.bits is not None
    assert sizing.bits < 4, "by bits alone nothing does"
    assert all(entry.best is None for entry in sizing.table)


def test_bits_that_fit_fit(hollow: Callable[[str], Model]) -> None:
    """At exactly those bits everywhere the card is full."""
    needs = Needs((CacheLayer("global", 64, None, 2),) * 4, SIZES)
    weights = DeviceWeights(8_000_000_000, 0, 2, 1_000_000_000, 0)
    bits = bits_that_fit(needs, small_card(6 * 10**9), Request(1000), weights, 8_000_000_000, 4_000_000_000)
    filled = DeviceWeights(int(bits * 4_000_000_000 / 8), 0, 2, 1_000_000_000, 0)
    assert abs(fit(needs, small_card(6 * 10**9), filled.on_card(), Request(1000)).left_bytes) <= 1


def test_the_least_number_of_cards_is_the_least() -> None:
    needs = Needs((CacheLayer("global", 64, None, 2),) * 4, SIZES)
    weights = DeviceWeights(20_000_000_000, 0, 2, 1_000_000_000, 0)
    card, request = small_card(10 * 10**9), Request(1000)
    assert cards_needed(needs, card, weights, request, lambda _: True) == 4
    assert cards_needed(needs, card, weights, request, lambda n: n != 4) == 8
    assert cards_needed(needs, card, weights, request, lambda n: n < 4) is None


@pytest.mark.parametrize(
    ("said", "many", "key"),
    [
        ("h100-80gb", 1, "h100-80gb"),
        ("H100 80GB", 1, "h100-80gb"),
        ("2xl40s", 2, "l40s"),
        ("4 x H200", 4, "h200"),
        ("rtx4090", 1, "rtx-4090"),
        ("mi300", 1, "mi300x"),
        ("8xB200", 8, "b200"),
    ],
)
def test_cards_are_found_by_name(said: str, many: int, key: str) -> None:
    count, card = find_card(said)
    assert (count, card.key) == (many, key)


@pytest.mark.parametrize(
    ("said", "needle"),
    [
        ("h100", "may be h100-80gb or h100-nvl"),
        ("v100", "is none of rtx-4090"),
        ("", "is none of"),
        ("0xh200", "0xh200"),
    ],
)
def test_cards_that_are_not_known_are_refused(said: str, needle: str) -> None:
    with pytest.raises(InputError, match=needle):
        find_card(said)


def test_no_program_sees_more_than_the_driver_has() -> None:
    for card in CARDS:
        assert 0.95 < card.visible_bytes / (card.driver_mib * 2**20) < 1, card
    assert len({card.key for card in CARDS}) == len(CARDS) == 11
