"""`onecard plan` as a user meets it: answer, exit code, the card at 80 columns, the picture, and every refusal."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console

from babies import edit_json
from hollow import MAVERICK, SCOUT, published, write_hollow
from onecard.checkpoint.source import Folder
from onecard.planner.cards import CARDS, GIB
from onecard.report.fit_card import draw_fit
from onecard.report.plot import draw_plot

Planner = Callable[..., tuple[Result, dict[str, Any]]]
ASKED = (
    "weight_bytes",
    "kv_bytes",
    "workspace_bytes",
    "usable_bytes",
    "left_bytes",
    "fits",
    "max_context",
    "max_sequences",
)


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hollow(tmp_path_factory.mktemp("hollow") / "scout", published(SCOUT))


@pytest.fixture
def plan(onecard: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> Planner:
    """Runs `plan` and gives its stderr and its JSON line. Reading a weight fails."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was read")

    def run(*args: object) -> tuple[Result, dict[str, Any]]:
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "get", never)
            result = onecard("plan", *args)
        assert isinstance(result.exception, SystemExit | None), result.exception
        lines = result.stdout.splitlines()
        assert len(lines) == 1, result.output
        return result, json.loads(lines[0])

    return run


def drawn(facts: dict[str, Any], width: int = 80, plot: bool = False) -> str:
    """The card and the picture as a terminal of this width shows them."""
    out = io.StringIO()
    console = Console(file=out, width=width, markup=False, emoji=False, color_system=None)
    draw_fit(facts, console)
    if plot:
        draw_plot(facts, console)
    return out.getvalue()


def test_scout_on_one_h100(scout: Path, plan: Planner) -> None:
    result, facts = plan(scout, "--gpu", "h100-80gb", "--context", 131072, "--kv-dtype", "fp8", "--json")
    assert result.exit_code == 0
    assert "onecard plan" not in result.stderr, "--json: the line alone"
    assert all(key in facts for key in ASKED)
    assert facts["fits"] is True
    assert facts["left_bytes"] == facts["usable_bytes"] - sum(
        facts[f"{p}_bytes"] for p in ("weight", "kv", "workspace")
    )
    # The recipe that keeps attention is the largest that fits.
    assert (facts["candidate"], round(facts["weight_bytes"] / 1e9, 1)) == ("llama4-scout-h100", 64.9)
    assert facts["kv_bytes"] > (131072 * 48 * 1024 + 9 * GIB // 8) // 2
    assert facts["max_context"] >= 131072
    assert facts["serve"].startswith("vllm serve FOLDER --max-model-len 131072 --max-num-seqs 1 ")
    assert "--kv-cache-dtype fp8" in facts["serve"]
    assert [row["name"] for row in facts["table"]] == [card.name for card in CARDS]
    assert facts["better"] is None, "bf16 needs more than smaller passes"
    assert any("hybrid KV cache manager" in warning for warning in facts["fit_warnings"])
    assert any("10,485,760 tokens" in warning for warning in facts["fit_warnings"])
    assert not any("35033" in warning for warning in facts["fit_warnings"])


def test_what_does_not_fit_ends_in_three_and_says_what_would(scout: Path, plan: Planner) -> None:
    result, facts = plan(scout, "--gpu", "h100-80gb", "--context", 131072, "--sequences", 4)
    assert result.exit_code == 3
    assert (facts["fits"], facts["left_bytes"] < 0) == (False, True)
    assert result.stderr.count("error: ") == 1
    assert (
        "does not fit: 18.4 GiB too much for H100 80 GB. The least change that does: prompts in passes of"
        in result.stderr
    )
    # Each offer fits when it is asked for.
    for change in facts["changes"]:
        steps = " ".join(change["steps"])
        more: list[object] = ["--batch-tokens", 2048] if "passes" in steps else []
        more += ["--kv-dtype", "fp8"] if "fp8" in steps else []
        more += ["--no-vision"] if "tower" in steps else []
        again, found = plan(
            scout, "--gpu", "h100-80gb", "--context", 131072, "--sequences", 4, "--recipe", change["candidate"], *more
        )
        assert (again.exit_code, found["left_bytes"]) == (0, change["left_bytes"])
    again, _ = plan(scout, "--gpu", "h100-80gb", "--context", facts["max_context"], "--sequences", 4)
    assert again.exit_code == 0
    again, _ = plan(scout, "--gpu", f"{facts['cards_needed']}xh100-80gb", "--context", 131072, "--sequences", 4)
    assert again.exit_code == 0
    assert any("35033" in warning for warning in facts["fit_warnings"]), "int4 attention wants a newer vLLM"


def test_smaller_passes_let_more_in(scout: Path, plan: Planner) -> None:
    """128k tokens in a bf16 cache: with int4 attention, or with kept attention and smaller prefill batches."""
    _, facts = plan(scout, "--gpu", "h100-80gb", "--context", 131072, "--json")
    assert facts["candidate"] == "llama4-scout-h100-int4-attention"
    better = facts["better"]
    assert (better["candidate"], better["steps"]) == ("llama4-scout-h100", ["prompts in passes of 2,048"])
    result, again = plan(scout, "--gpu", "h100-80gb", "--context", 131072, "--batch-tokens", 2048)
    assert (result.exit_code, again["candidate"], again["left_bytes"]) == (0, better["candidate"], better["left_bytes"])
    assert "--max-num-batched-tokens 2048" in again["serve"]


def test_maverick_is_told_how_many_cards(tmp_path: Path, plan: Planner) -> None:
    folder = write_hollow(tmp_path / "maverick", published(MAVERICK))
    result, facts = plan(folder, "--gpu", "h100-80gb")
    assert result.exit_code == 3
    assert (facts["max_context"], facts["max_sequences"], facts["cards_needed"]) == (0, 0, 4)
    assert "It takes 4 such cards" in result.stderr
    text = drawn(facts)
    assert "by bits alone none fit" in " ".join(text.split())
    assert "not one token" in text


def test_without_a_card_all_cards_are_tabled(scout: Path, plan: Planner) -> None:
    result, facts = plan(scout, "--context", 16384)
    assert (result.exit_code, facts["fits"], facts["gpu"]) == (0, None, None)
    assert "weight_bytes" not in facts
    text = drawn(facts)
    assert "takes 4" in text
    for row in facts["table"]:
        if row["candidate"] is not None:
            one, alone = plan(scout, "--gpu", row["gpu"], "--context", 16384, "--json")
            assert (one.exit_code, alone["candidate"]) == (0, row["candidate"])
            assert {key: alone[key] for key in ASKED} == {key: row[key] for key in ASKED}
            break


def test_a_recipe_says_what_it_takes_and_what_it_needs(
    baby: Callable[..., Path], recipe: Callable[..., Path], plan: Planner
) -> None:
    result, facts = plan(baby("scout"), "--recipe", recipe(method="rtn"), "--gpu", "rtx-4090", "--context", 64)
    assert result.exit_code == 0
    assert (facts["recipe"], facts["candidate"]) == ("test", "test")
    assert facts["estimated_seconds"] > 0
    assert 0 < facts["weight_bytes"] < facts["emitted_bytes"], "headers do not lie on the card"


def test_a_finished_checkpoint_is_planned_as_it_is(
    emitted: Callable[[str], tuple[Path, Result]], plan: Planner
) -> None:
    out, _ = emitted("scout")
    result, facts = plan(out, "--gpu", "l40s", "--context", 128)
    assert (result.exit_code, facts["candidate"], facts["cards"]) == (0, "as it is", 1)
    assert [c["name"] for c in facts["candidates"]] == ["as it is"]
    _, dense = plan(out, "--gpu", "l40s", "--context", 128, "--engine", "transformers")
    assert facts["weight_bytes"] < dense["weight_bytes"]
    assert any("unpacks" in warning for warning in dense["fit_warnings"])
    assert dense["serve"] is None


def test_wrong_figures_of_a_config_are_named_once(
    copied: Callable[..., Path], recipe: Callable[..., Path], onecard: Callable[..., Result]
) -> None:
    folder = copied("scout")
    edit_json(folder / "config.json", lambda config: config["text_config"].update(rms_norm_eps=1e-6))
    for more in ([], ["--recipe", recipe(method="rtn")]):
        result = onecard("plan", folder, *more)
        assert result.exit_code == 0
        assert result.stderr.count("Llama 4 was trained with 1e-05") == 1


@pytest.mark.parametrize("case", ["fits", "not", "several", "images", "no card"])
def test_card_and_picture_keep_to_80_columns(scout: Path, plan: Planner, case: str) -> None:
    args: dict[str, list[object]] = {
        "fits": ["--gpu", "h200"],
        "not": ["--gpu", "h100-80gb", "--context", 131072, "--sequences", 4],
        "several": ["--gpu", "2xh100-nvl", "--context", 1_000_000],
        "images": ["--gpu", "h200", "--images", 4, "--kv-dtype", "fp8"],
        "no card": [],
    }
    _, facts = plan(scout, *args[case], "--json")
    text = drawn(facts, plot=True)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line.startswith(("╭", "│", "╰", " ", "GiB")) for line in lines), "nothing was wrapped"
    assert ("usable on" in text) == (case != "no card")
    for row in facts["candidates"]:
        assert any(row["name"] in line for line in lines), "a name is never cut"
    for card in CARDS:
        assert any(card.name in line for line in lines)
    assert any("Cards, " in line and ("that fits)" in line or "a card)" in line) for line in lines)


def test_the_picture_has_every_curve_and_the_cards_edge(scout: Path, plan: Planner) -> None:
    result, facts = plan(scout, "--gpu", "h100-80gb", "--context", 131072, "--plot")
    assert "GiB against tokens of context" in result.stderr
    assert [curve["name"] for curve in facts["curves"]] == [c["name"] for c in facts["candidates"]]
    for curve in facts["curves"]:
        assert curve["bytes"] == sorted(curve["bytes"])
        assert len(curve["bytes"]) == len(curve["contexts"])
    text = drawn(facts, plot=True)
    assert "as it is (above)" in text
    assert "71.2 ┤" in text
    braille = [line for line in text.splitlines() if any("\u2801" <= sign <= "\u28ff" for sign in line)]
    assert len(braille) > 4
    # A curve rises: its dots begin low on the left and end high on the right.
    first = max(i for i, line in enumerate(braille) if "\u2801" <= line[8:9] <= "\u28ff")
    assert first == len(braille) - 1


@pytest.mark.parametrize(
    ("args", "needles"),
    [
        (["--gpu", "v100"], ["'v100' is none of rtx-4090", "mi300x"]),
        (["--gpu", "h100"], ["may be h100-80gb or h100-nvl"]),
        (["--gpu", "2xh200", "--tensor-parallel", "4"], ["names 2 cards and --tensor-parallel 4"]),
        (["--gpu", "3xh200"], ["cannot be cut over 3 cards", "40 attention heads cannot be shared among 3 cards"]),
        (["--gpu", "h200", "--engine", "transformers", "--kv-dtype", "fp8"], ["transformers has no fp8 KV cache"]),
        (["--gpu", "2xh200", "--engine", "llama.cpp"], ["several cards are planned for vllm only"]),
        (["--gpu", "h200", "--images", "2", "--no-vision"], ["--images 2 needs a vision tower"]),
        (["--gpu", "h200", "--images", "2", "--context", "100"], ["2 images take up to 4,896 tokens", "100"]),
        (["--plot"], ["--plot draws memory against a card's"]),
        (["--tensors"], ["--tensors lists what a recipe will emit"]),
        (["--recipe", "nosuch"], ["there is no recipe 'nosuch'"]),
        (["--recipe", "qwen3-30b-a3b-24gb"], ["is for qwen3_moe"]),
    ],
)
def test_what_cannot_be_planned_is_refused(
    scout: Path, onecard: Callable[..., Result], refused: Callable[..., str], args: list[str], needles: list[str]
) -> None:
    refused(onecard("plan", scout, *args), *needles)


def test_images_need_a_model_that_sees(
    baby: Callable[..., Path], onecard: Callable[..., Result], refused: Callable[..., str]
) -> None:
    refused(onecard("plan", baby("qwen3"), "--images", 1), "--images 1 needs a vision tower, and qwen3_moe has none")


def test_without_a_context_no_more_is_planned_than_the_model_takes(
    baby: Callable[..., Path], onecard: Callable[..., Result]
) -> None:
    """vLLM refuses to start with more positions than config.json has (256 for a baby)."""
    planned = json.loads(onecard("plan", baby("llama4-text"), "--gpu", "l40s", "--json").stdout)
    assert (planned["context"], planned["fits"]) == (256, True)
    assert "--max-model-len 256" in planned["serve"]
    longer = json.loads(onecard("plan", baby("llama4-text"), "--gpu", "l40s", "--context", 512, "--json").stdout)
    assert longer["serve"] is None
