"""`verify` and `flips`: what is refused before any work, and what must not stop them."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from click.testing import Result

from babies import changed_copy
from command_line import refused, run_onecard, strict
from documents import ITEMS

BROKEN_BLOCKS = [
    {"blocks": [{"block": 0} | more]}
    for more in ({}, {"expert_rows": [1]}, {"expert_rows": 7}, {"expert_rows": ["x"] * 8})
]


@pytest.mark.parametrize("option", ["--record", "--keep-tokens"])
@pytest.mark.parametrize("place", ["missing/file", "a-folder"])
def test_a_place_that_cannot_be_written_is_refused_at_once(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    place: str,
) -> None:
    (tmp_path / "a-folder").mkdir()

    def walked(*args: object, **kwargs: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr("onecard.eval.verify.measure", walked)
    result = onecard("verify", baby("qwen3"), baby("qwen3"), *texts[2:], option, tmp_path / place)
    refused(result, tmp_path / place, "cannot be written")
    if option == "--record":
        refused(onecard("flips", baby("qwen3"), baby("qwen3"), option, tmp_path / place), "cannot be written")
    assert not (tmp_path / "missing").exists()


def test_a_read_only_folder_and_a_checkpoints_record_are_refused_at_once(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = emitted("scout")[0]
    own = checkpoint / "onecard.json"
    before = own.read_bytes()
    refused(run_onecard("flips", baby("scout"), checkpoint, "--record", own), own, "another file")
    assert own.read_bytes() == before
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    refused(run_onecard("flips", baby("scout"), checkpoint, "--record", tmp_path / "x"), "read-only")


def test_bad_tasks_and_pairs_are_refused(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    jsonl: Callable[..., Path],
    recipe: Callable[..., Path],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qwen, scout = baby("qwen3"), baby("scout")
    good, bad = jsonl("good.jsonl", ITEMS), jsonl("bad.jsonl", [*ITEMS[:2], {"question": "?"}])
    refused(onecard("flips", qwen, qwen, "--tasks", "mmul"), "mmul", "hellaswag")
    refused(onecard("flips", qwen, qwen, "--tasks", f"{good},"), "there is no task ''")
    refused(onecard("flips", qwen, qwen, "--tasks", bad), bad, "item 3", "choices, answer")
    refused(onecard("flips", qwen, scout, "--tasks", good), "no version of")
    refused(onecard("verify", qwen, qwen, "--recipe", recipe(tasks=[str(bad)]), *texts[2:]), bad, "item 3")
    assert onecard("flips", qwen, qwen, "--shots", "-1").exit_code == 2
    assert onecard("flips", qwen, qwen, "--items", "0").exit_code == 2

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    refused(onecard("flips", qwen, qwen, "--tasks", "mmlu"), "cais/mmlu", ".jsonl", code=4)


def test_a_disk_that_is_full_when_tokens_are_kept(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: object, path: Path) -> None:
        Path(path).write_bytes(b"PAR1 half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.Dataset.to_parquet", full)
    place = tmp_path / "tokens.parquet"
    result = onecard("verify", baby("qwen3"), baby("qwen3"), *texts[2:], "--keep-tokens", place)
    refused(result, "tokens.parquet", "full", code=4)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_a_record_or_with_a_broken_one_is_verified_all_the_same(
    baby: Callable[..., Path],
    emitted: Callable[..., tuple[Path, Result]],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """Other tools' checkpoints have no record; then calibration rows are unknown."""
    bare = changed_copy(emitted("qwen3")[0], tmp_path / "bare", lambda _, tensor: tensor)
    for text in (None, "{broken", "[]", '{"blocks": 3}', *map(json.dumps, BROKEN_BLOCKS)):
        (bare / "onecard.json").unlink() if text is None else (bare / "onecard.json").write_text(text)
        result = onecard("verify", baby("qwen3"), bare, *texts[2:], "--record", tmp_path / "record.json")
        assert result.exit_code == 0, (text, result.output)
        experts = strict((tmp_path / "record.json").read_text())["errors"]["experts"]
        assert {expert["calibration_rows"] for expert in experts} == {None}


def test_tokens_that_are_kept_twice_are_compared_as_pairs(
    baby: Callable[..., Path], onecard: Callable[..., Result], texts: list[str], tmp_path: Path
) -> None:
    """For two checkpoints on the same texts each line is the same token of the same document."""

    def softer(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 0.5 if name.endswith("lm_head.weight") else tensor

    other = changed_copy(baby("qwen3"), tmp_path / "other", softer)
    tables = []
    for number, checkpoint in enumerate((baby("qwen3"), other)):
        path = tmp_path / f"{number}.parquet"
        assert onecard("verify", baby("qwen3"), checkpoint, *texts[2:], "--keep-tokens", path).exit_code == 0
        tables.append(pyarrow.parquet.read_table(path))
    for column in ("document", "document_digest", "kind", "source", "position", "token", "logp_reference"):
        assert tables[0][column].equals(tables[1][column]), column
    assert max(tables[0]["kl_nats"].to_pylist()) == 0 < min(tables[1]["kl_nats"].to_pylist())
    assert tables[1]["same_top1"].to_pylist() == [True] * len(tables[1])


def test_a_task_is_named_once_and_a_file_for_one_thing(
    baby: Callable[..., Path], texts: list[str], tmp_path: Path
) -> None:
    """Runs are paired by task names, so these must differ. Record and tokens must not share a file."""
    model = baby("llama4-text")
    refused(run_onecard("flips", model, model, "--tasks", "demo,demo"), "demo: named twice")
    both = tmp_path / "both"
    given = ("--record", both, "--keep-tokens", both)
    refused(run_onecard("verify", model, model, *texts[2:], *given), both, "named for two things")
    assert not both.exists()
