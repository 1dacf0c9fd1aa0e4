"""The floor of a verification: what its dtype costs by itself. The judge computes both walks' logits whole, in fp64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from command_line import one_line, refused, strict
from gate_records import record as old_record
from onecard.calibration.sources import read_jsonl
from onecard.calibration.tokens import Encoder
from onecard.checkpoint.model import Model, open_model
from onecard.core.layout import json_bytes
from onecard.core.rates import first_guess
from onecard.core.record.reading import check_record, read_record
from onecard.core.rows import Row
from onecard.models.walk import Embedder
from onecard.planner.schedule import verification_schedule
from onecard.report.card_tables import measured
from onecard.report.html import render
from walking import cpu_walk


def log_probabilities(model: Model, row: Row, dtype: torch.dtype) -> torch.Tensor:
    """Of the next token after each but the last, fp64 [T, V], by a walk in `dtype`. The head is fp32 in either."""
    walk = cpu_walk(model, dtype=dtype)
    hidden = Embedder(walk, [row]).batch([0])
    for index in range(model.adapter.n_blocks):
        hidden = walk.load(index).forward(hidden)
    with torch.inference_mode():
        normed = walk.final_norm()(hidden)[0, :-1]
        return torch.log_softmax((normed.float() @ walk.head().float().T).double(), -1)


@pytest.mark.parametrize("family", ["llama4-text", "qwen3"])
def test_a_floor_is_the_kl_of_the_original_against_itself(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    family: str,
) -> None:
    """Beside it stands the dtype that it is of: on the card, the line, the record, the page and the model card."""
    own = ["--recipe", recipe(compute_dtype="bfloat16", evaluation_row_tokens=60), *texts[2:]]
    plain = onecard("verify", baby(family), emitted(family)[0], *own, "--record", tmp_path / "plain.json")
    result = onecard("verify", baby(family), emitted(family)[0], *own, "--floor", "--record", tmp_path / "r.json")
    line, found = one_line(result), strict((tmp_path / "r.json").read_text())
    model = open_model(str(baby(family)))
    rows = [Encoder(model.path, model.adapter).encode(d) for d in read_jsonl(Path(texts[3]))]
    gaps: list[torch.Tensor] = []
    for row in (Row(r.document, r.kind, r.tokens[:60]) for r in rows):
        p, q = (log_probabilities(model, row, dtype) for dtype in (torch.float32, torch.bfloat16))
        gaps.append((p.exp() * (p - q)).sum(-1))
    expected = float(torch.cat(gaps).mean())
    floor = found["kl"]["floor"]
    assert expected > 1e-6
    assert floor["kl_mean_nats"] == pytest.approx(expected, rel=1e-3)
    assert floor["kl_low_nats"] <= floor["kl_mean_nats"] <= floor["kl_high_nats"]
    assert (floor["compute_dtype"], found["compute_dtype"], line["compute_dtype"]) == ("bfloat16",) * 3
    assert line["floor_kl_mean_nats"] == floor["kl_mean_nats"]
    said = f"{floor['kl_mean_nats']:.5f} nats a token"
    assert said in result.stderr
    assert "verify --floor" in plain.stderr
    assert "verify --floor" not in result.stderr
    without = strict((tmp_path / "plain.json").read_text())["kl"]
    assert without == {key: value for key, value in found["kl"].items() if key != "floor"}
    read = read_record(tmp_path / "r.json")
    assert read.kl is not None
    assert any("floor" in row[0] for row in measured(read.kl))
    page = render(read)
    assert "original in float32 || original in bfloat16" in page
    assert "computed in" in page


def test_a_float32_verification_has_no_floor(
    baby: Callable[..., Path], onecard: Callable[..., Result], recipe: Callable[..., Path]
) -> None:
    """Refused at once, before the two are found to be no pair."""
    arguments = [baby("qwen3"), baby("scout"), "--recipe", recipe(), "--floor", "--device", "cpu"]
    refused(onecard("verify", *arguments), "computes in float32", "compute_dtype: bfloat16")


def test_an_older_record_is_rewritten_as_it_was() -> None:
    """Neither the dtype nor the floor is invented for it."""
    old: dict[str, Any] = {key: value for key, value in old_record().items() if key != "compute_dtype"}
    written = check_record(old, "old").to_json()
    assert {key: written[key] for key in old} == old
    assert "compute_dtype" not in written
    assert json_bytes(check_record(written, "again").to_json()) == json_bytes(written)


def test_a_floor_is_expected_in_the_schedule(baby: Callable[..., Path]) -> None:
    """Its walk has stages of its own, of about the verification's seconds, before the last one."""
    adapter = open_model(str(baby("qwen3"))).adapter
    rates = first_guess(torch.device("cpu"), torch.bfloat16)
    plain, more = (
        verification_schedule(adapter, 10**9, 10**9, 10**6, rates, with_tasks=False, with_floor=floor).stages
        for floor in (False, True)
    )
    added = more[len(plain) - 1 : -1]
    assert (*more[: len(plain) - 1], more[-1]) == plain
    assert [task for stage in added for task in stage.tasks if not task.startswith("floor: ")] == []
    walked = [stage.weight for stage in plain if stage.block is not None]
    assert [stage.weight for stage in added if stage.block is not None] == pytest.approx(walked)
