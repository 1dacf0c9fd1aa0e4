"""`--device cuda:1` means that card, and a card works deterministically, shown with a stand-in for torch.cuda."""

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecard.core.device import CUBLAS_WORKSPACE, choose_device, site_budget
from onecard.core.errors import InputError
from onecard.report.resources import describe_machine, device_name, peak_device_bytes

ROOT = Path(__file__).parents[1]
OURS = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("tests", "benchmarks", "build", ".venv")]
# Questions that are not about one card.
OF_NO_CARD = {"is_available", "device_count", "is_initialized", "current_device"}


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int | None]]]:
    """Two cards. The list gets (function of torch.cuda, the card it was asked about)."""
    asked: list[tuple[str, int | None]] = []
    present = [0]

    def about(name: str, answer: object) -> Callable[..., object]:
        def ask(card: Any = None) -> object:
            asked.append((name, card.index if isinstance(card, torch.device) else card))
            return answer

        return ask

    def set_device(card: torch.device) -> None:
        present[0] = present[0] if card.index is None else card.index

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: present[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", about("get_device_name", "a card"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", about("max_memory_allocated", 5))
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", about("get_device_properties", properties))
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    switches = [
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),
    ]
    before = [getattr(*switch) for switch in switches]
    yield asked
    torch.use_deterministic_algorithms(False)
    for (owner, name), value in zip(switches, before, strict=True):
        setattr(owner, name, value)


def test_a_card_is_made_deterministic_and_the_present_one(cards: list[tuple[str, int | None]]) -> None:
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert torch.cuda.current_device() == 1
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ[CUBLAS_WORKSPACE] == ":4096:8"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert choose_device("cuda") == torch.device("cuda:1")  # the present one, by its number
    assert choose_device("cuda:0") == torch.device("cuda:0")


def test_a_cpu_stays_as_it_is(cards: list[tuple[str, int | None]]) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    assert CUBLAS_WORKSPACE not in os.environ
    assert describe_machine(torch.device("cpu"))["device"] == "cpu"
    assert cards == []


def test_every_question_is_about_the_chosen_card(
    cards: list[tuple[str, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert (device_name(device), peak_device_bytes()) == ("a card", 5)
    assert describe_machine(device)["device"] == "a card"
    assert site_budget(device) > 0
    assert {name for name, _ in cards} >= {"get_device_name", "max_memory_allocated"}
    assert {card for _, card in cards} <= {1}


def test_no_question_leaves_the_card_open() -> None:
    """In the whole package: torch.cuda.NAME() without a device would ask the present card, or the first."""
    open_ones, calls = [], 0
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.cuda."):
                calls += 1
                name = ast.unparse(node.func).removeprefix("torch.cuda.")
                if name not in OF_NO_CARD and not node.args and not node.keywords:
                    open_ones.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert calls > 5
    assert not open_ones


@pytest.mark.parametrize(("kept", "used", "said"), [(":0:0", False, ":0:0"), (None, True, "before Python starts")])
def test_what_cannot_be_made_deterministic_is_refused(
    cards: list[tuple[str, int | None]], monkeypatch: pytest.MonkeyPatch, kept: str | None, used: bool, said: str
) -> None:
    if kept is not None:
        monkeypatch.setenv(CUBLAS_WORKSPACE, kept)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    with pytest.raises(InputError, match=said):
        choose_device("cuda:0")
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    assert choose_device("cuda:0") == torch.device("cuda:0")
    assert os.environ[CUBLAS_WORKSPACE] == ":16:8"
