"""The planner's model of a GPU beside the counted one, and what it says without a card.

benchmarks/gpu_cost.json is what `python benchmarks/gpu_cost.py --write` counts in the real code. Both cost what
core/card_rates.py assumes of an H100. No GPU has confirmed either.
"""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from command_line import refused
from counted import ENTRIES, EVALUATED, MODELS, beside, recipe_of, work_of
from hollow import SCOUT, published, write_hollow
from onecard.checkpoint.activations import Room
from onecard.checkpoint.keeper import MOST_LOST_SECONDS
from onecard.checkpoint.model import Model, open_headers
from onecard.core.card_rates import H100_80GB, CardRates
from onecard.core.rates import DISK_BYTES_PER_SECOND
from onecard.eval import card_rates, machine_rates
from onecard.forecast import machine_of
from onecard.planner import card_times
from onecard.planner.cost import times_of
from onecard.planner.layer_kernels import layer_kernels
from onecard.planner.memory import compute_bytes, read_ahead_bytes
from onecard.planner.rows import CARD_SHARE, RowPlaces, rows_on_device
from onecard.planner.schedule import run_stages
from onecard.planner.work import Tokens

BOUND = 0.15
# Whose time is not held. Maverick's dense blocks wait for the thread that still reads back 9 GB of the block before, of
# which the plan knows nothing. (By `fast` it needs 172 GB, which no such card has.)
NOT_HELD = {("maverick", "fast")}
TOKENS = Tokens(2**20, EVALUATED)
Opened = Callable[[str], Model]


@pytest.fixture(scope="module", autouse=True)
def layers_once() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_times, "layer_kernels", cache(layer_kernels))
        yield


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    @cache
    def found(name: str) -> Model:
        return open_headers(str(write_hollow(tmp_path_factory.mktemp("hollow") / name, published(name))))

    return found


@pytest.mark.parametrize(("model", "method", "tokens"), ENTRIES)
def test_time_and_peak_agree_with_the_counted_model(opened: Opened, model: str, method: str, tokens: int) -> None:
    found = beside(opened(MODELS[model][0]), model, method, tokens)
    assert found.peak_bytes == pytest.approx(found.counted_peak_bytes, rel=BOUND)
    if method != "rtn":
        assert found.seconds["quantize"] == pytest.approx(found.counted["stages"]["quantize"], rel=BOUND)
    if (model, method) not in NOT_HELD:
        assert sum(found.seconds.values()) == pytest.approx(found.counted["seconds"], rel=BOUND)


def test_a_faster_card_takes_no_longer(opened: Opened) -> None:
    work, rates = work_of(opened(SCOUT), "scout", "best", TOKENS), H100_80GB.rates
    before = times_of(work, rates, 32768)
    for field in fields(CardRates):
        faster = replace(rates, **{field.name: 2 * getattr(rates, field.name)})
        assert sum(times_of(work, faster, 32768).by_kind().values()) <= sum(before.by_kind().values()), field.name
    twice = {field.name: 2 * getattr(rates, field.name) for field in fields(CardRates)}
    halved = times_of(work, replace(rates, **twice), 32768)
    assert sum(halved.by_kind().values()) == pytest.approx(sum(before.by_kind().values()) / 2)
    stages = run_stages(work, before)
    assert sum(stage.weight for stage in stages) == pytest.approx(sum(before.by_kind().values()))


def test_more_tokens_take_proportionally_longer(opened: Opened) -> None:
    def computed(tokens: int) -> float:
        parts = times_of(
            work_of(opened(SCOUT), "scout", "fast", Tokens(tokens, EVALUATED)), H100_80GB.rates, 32768
        ).by_kind()
        return parts["statistics"] + parts["propagate"]

    assert computed(2**19) == pytest.approx(computed(2**18) * 2)


def test_rows_lie_on_the_card_then_in_ram_then_in_files(opened: Opened) -> None:
    work = work_of(opened(SCOUT), "scout", "balanced", TOKENS)
    budget = machine_of(H100_80GB, recipe_of("scout", "balanced")).site_budget_bytes
    room = rows_on_device(work, H100_80GB.card_bytes, budget)
    assert room + compute_bytes(work, budget) == int(H100_80GB.card_bytes * CARD_SHARE)
    assert int(H100_80GB.card_bytes * CARD_SHARE) <= 74_000_000_000
    stream = 2**20 * 5120 * 2
    all_rows = 5 * stream + 4 * EVALUATED * 5120 * 2
    for device, ram in ((0, 0), (stream, stream), (10**12, 0)):
        places = RowPlaces.of(work, Room(device, ram), batch_tokens=0, block_seconds=50.0)
        assert places.device_bytes + places.ram_bytes + places.file_bytes == all_rows
        assert (places.device_bytes, places.ram_bytes) == (min(device, all_rows), min(ram, all_rows))
        assert places.disk_bytes >= places.file_bytes + places.commit_bytes
        writing = places.commit_bytes / DISK_BYTES_PER_SECOND
        assert places.blocks_per_commit * 50.0 + writing <= MOST_LOST_SECONDS
        assert (places.blocks_per_commit + 1) * 50.0 + writing > MOST_LOST_SECONDS


def test_pinned_rows_take_powers_of_two(opened: Opened) -> None:
    """A batch of 32,768 rows of 5,120 bf16 numbers, 1.25 times 2^28 bytes, takes 2^29."""
    work = work_of(opened(SCOUT), "scout", "fast", TOKENS)
    places = RowPlaces.of(work, Room(0, 16 * 2**29), batch_tokens=32768)
    assert (places.ram_bytes, places.ram_taken_bytes) == (16 * 5 * 2**26, 16 * 2**29)


def test_what_is_read_ahead_is_a_block_in_powers_of_two(opened: Opened) -> None:
    gate_up, down = 2 * 2 * 5120 * 8192, 2 * 5120 * 8192
    experts = 16 * (2 ** (gate_up - 1).bit_length() + 2 ** (down - 1).bit_length())
    assert experts < read_ahead_bytes(opened(SCOUT).adapter) < 1.3 * experts


def test_plan_says_what_an_h100_would_take(
    onecard: Callable[..., Result], baby: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    result = onecard("plan", baby("scout"), "--recipe", recipe(method="balanced"), "--assume", "h100-80gb")
    assert result.exit_code == 0, result.output
    assert "a model that no GPU has confirmed" in " ".join(result.stderr.split())
    facts = json.loads(result.stdout)
    assert facts["time_is_a_model"] is True
    assert "not measured" in facts["rates_from"]
    assert facts["rates"]["bf16_flops"] == H100_80GB.rates.bf16_flops
    assert facts["rows_on_device_bytes"] > 0 == facts["rows_in_files_bytes"]
    assert facts["blocks_per_commit"] == 1
    refused(onecard("plan", baby("scout"), "--assume", "h100-80gb"), "--assume", "--recipe")


def test_each_kind_of_kernel_is_measured_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a CPU, which has all of them but the solver's own."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("SECONDS", 0.001), ("FACTORED", 64), ("COPIED", 2**16), ("ROWS", 64), ("SYNCED_FILES", 2)):
        monkeypatch.setattr(card_rates, name, value)
    monkeypatch.setattr(machine_rates, "FILE_BYTES", 2**24)
    found = card_rates.measure_card(torch.device("cpu"))
    assert all(getattr(found, field.name) > 0 for field in fields(CardRates))
    assert list(tmp_path.iterdir()) == []
