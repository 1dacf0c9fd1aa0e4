"""Coverage: counts equal transformers' own routes, a run calibrates on the chosen rows, and pictures are sound."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from command_line import Refuse
from onecard.calibration.routes import count_routes
from onecard.checkpoint.activations import Activations
from onecard.checkpoint.loading import load_with_transformers
from onecard.checkpoint.model import open_model
from onecard.core.rows import Row
from onecard.report.heatmap import BARS, NONE, STEPS, draw_coverage, least_line, step_of, svg
from walking import cpu_walk


@pytest.mark.parametrize("family", ["llama4-text", "maverick", "qwen3", "deepseek", "mixtral"])
def test_counts_are_the_routes_of_transformers(baby: Callable[..., Path], tmp_path: Path, family: str) -> None:
    layers = 3 if family == "qwen3" else 2
    model = open_model(str(baby(family, layers)))
    generator = torch.Generator().manual_seed(1)
    rows = [
        Row(str(n), "text", torch.randint(4, 200, (length,), generator=generator))
        for n, length in enumerate([20, 9, 20, 9, 20])
    ]
    routes = count_routes(cpu_walk(model, 40).hidden_rows(rows, Activations(tmp_path / "acts")))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    network = load_with_transformers(model.path, torch.float32)
    top = model.adapter.top_k
    chosen: list[torch.Tensor] = []
    for name, module in network.named_modules():
        if name.endswith((".router", ".mlp.gate")):

            def hook(m: Any, i: Any, o: Any) -> None:
                logits = torch.nn.functional.linear(i[0].reshape(-1, i[0].shape[-1]), m.weight)
                # DeepSeek's takes those whose logits and biases are best, of some of the groups.
                chosen.append(o[2] if family == "deepseek" else logits.topk(top).indices)

            module.register_forward_hook(hook)
    experts = model.adapter.n_experts
    for number, row in enumerate(rows):
        chosen.clear()
        with torch.inference_mode():
            network(input_ids=row.tokens[None])
        expected = [torch.bincount(indices.flatten(), minlength=experts).tolist() for indices in chosen]
        assert routes.counts_RLE[number].tolist() == expected
    assert len(routes.blocks) == len(chosen)


def texts(path: Path, count: int = 60) -> Path:
    rows = [
        {"text": f"{n} text of {n * n} words {chr(97 + n % 26) * (n % 7)}, and {n % 5} more of them"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_calibrates_on_the_chosen_rows(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run's experts get the rows that `coverage` predicted. A killed run keeps its choice without a new count."""
    path, held = texts(tmp_path / "c.jsonl"), tmp_path / "e.jsonl"
    held.write_text('{"text": "held out, all of it"}\n')
    use = recipe(calibration_pool=4.0, warn_below_expert_rows=16, output_blocks=0, refine_rounds=0)
    arguments = ["--recipe", use, "--calibration", path, "--evaluation", held]
    told = onecard("calibration", "coverage", baby("llama4-text"), *arguments, "--svg", tmp_path / "map.svg")
    assert told.exit_code == 0, told.stderr
    line = json.loads(told.stdout)
    assert (line["rows"], line["pool_rows"]) == (8, 32)
    assert line["worth"] > line["worth_drawn"]
    out = tmp_path / "out"
    from onecard import stages  # the run is killed after its first block

    whole = stages.quantize_block
    monkeypatch.setattr(stages, "quantize_block", lambda job: _stop() if job.index else whole(job))
    assert onecard("quantize", baby("llama4-text"), out, *arguments).exit_code == 130
    monkeypatch.setattr(stages, "quantize_block", whole)
    from onecard.calibration import coverage

    monkeypatch.setattr(coverage, "count_routes", lambda *_: pytest.fail("counted again"))
    result = onecard("quantize", baby("llama4-text"), out, *arguments, "--resume")
    assert result.exit_code == 0, result.stderr
    record = json.loads((out / "onecard.json").read_text())
    # Routes of the first block do not depend on what is quantized.
    assert record["blocks"][0]["expert_rows"] == line["blocks"][0]["expert_rows"]
    facts = record["texts"]["calibration"]
    assert (facts["rows"], facts["rows_digest"]) == (8, line["rows_digest"])
    assert (facts["balance"]["pool_rows"], facts["balance"]["worth"]) == (32, line["worth"])
    assert "least expert of each block" in result.stderr
    drawn = onecard("calibration", "--coverage", out)
    assert drawn.exit_code == 0, drawn.stderr
    assert json.loads(drawn.stdout)["blocks"][0]["expert_rows"] == line["blocks"][0]["expert_rows"]


def _stop() -> Any:
    raise KeyboardInterrupt


def test_a_pool_that_holds_no_more_than_is_wanted(
    baby: Callable[..., Path], onecard: Callable[..., Result], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    use = recipe(calibration_pool=2.0, output_blocks=0, refine_rounds=0, evaluation_rows=2)
    result = onecard(
        "quantize", baby("qwen3"), tmp_path / "out", "--recipe", use, "--calibration", texts(tmp_path / "c.jsonl", 4)
    )
    assert result.exit_code == 0, result.stderr
    assert "nothing to choose from" in result.stderr


def test_bad_pictures_and_records(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Refuse,
    recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    refused(
        onecard("calibration", "coverage", baby("qwen3"), "--recipe", recipe(), "--svg", tmp_path / "x.png"), "x.png"
    )
    refused(onecard("calibration", "coverage", baby("qwen3")), "--recipe")
    (tmp_path / "onecard.json").write_text('{"blocks": [], "recipe": {}}')
    refused(onecard("calibration", "coverage", tmp_path), "holds no counts")


@given(st.lists(st.lists(st.integers(0, 5000), min_size=3, max_size=3), min_size=1, max_size=4))
def test_pictures_hold_every_count(counts: list[list[int]]) -> None:
    blocks = list(range(3, 3 + len(counts)))
    drawing = ET.fromstring(svg("a <title> & more", blocks, counts, 256))
    titles = [e.text or "" for e in drawing.iter("{http://www.w3.org/2000/svg}title")]
    for block, layer in zip(blocks, counts, strict=True):
        for expert, count in enumerate(layer):
            assert any(t.startswith(f"block {block}, expert {expert}: {count:,} rows") for t in titles)
    console = Console(width=120, record=True, quiet=True)
    draw_coverage("title", blocks, counts, 256, console)
    line = least_line(counts)
    assert [character == NONE for character in line] == [min(layer) == 0 for layer in counts]


def test_steps() -> None:
    layer = [64, 0, 0, 0]  # an even share is 16
    bounds = [int(bound * 16) for bound in STEPS]
    assert [step_of(bound, layer) for bound in bounds] == list(range(1, 7))
    assert [step_of(bound - 1, layer) for bound in bounds] == list(range(6))
    assert len(BARS) == len(STEPS) + 1
    assert step_of(0, [0, 0]) == 0
