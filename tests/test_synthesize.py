"""Self-written answers: a loaded model and the walk write the same tokens, a killed and resumed run the same text, and
the rows can be read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from command_line import Refuse
from onecard.calibration.conversations import pick
from onecard.calibration.decode import BlockDecoder
from onecard.calibration.sources import read_jsonl
from onecard.checkpoint.loading import load_with_transformers
from onecard.checkpoint.model import open_model
from onecard.core.rows import Row
from runs import days_later
from walking import cpu_walk


@pytest.mark.parametrize("family", ["llama4-text", "qwen3"])
def test_logits_of_texts_that_grow_are_those_of_transformers(baby: Callable[..., Path], family: str) -> None:
    """Prompts of mixed lengths cross chunks of 8, and padding changes nothing."""
    model = open_model(str(baby(family)))
    generator = torch.Generator().manual_seed(0)
    rows = [
        Row(str(n), "t", torch.randint(4, 200, (length,), generator=generator)) for n, length in enumerate([5, 64, 17])
    ]
    decoder = BlockDecoder(cpu_walk(model, 128), rows)
    network = load_with_transformers(model.path, torch.float32)
    for numbers in ([0, 1, 2], [2, 1]):
        logits = decoder.next_logits(numbers)
        for number, found in zip(numbers, logits, strict=True):
            with torch.inference_mode():
                expected = network(input_ids=torch.tensor([decoder.tokens[number]])).logits[0, -1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            decoder.tokens[number].append(int(found.argmax()))


TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"why {word}?"},
            {"role": "assistant", "content": "because"},
            {"role": "user", "content": "and then?"},
        ]
    }
    for word in ("a", "abc", "not", "never")
] + [
    # The text is read, and that is said.
    {"text": "no conversation", "messages": [{"role": "user", "content": "why?"}]},
    {"messages": [{"role": "assistant", "content": "nobody asked"}]},
]


@pytest.fixture
def talks(jsonl: Callable[..., Path]) -> Path:
    return jsonl("talks.jsonl", TALKS)


@pytest.fixture
def write(onecard: Callable[..., Result], recipe: Callable[..., Path], talks: Path) -> Callable[..., Result]:
    use = recipe(calibration_row_tokens=64)

    def run(model: Path, out: Path, *arguments: object) -> Result:
        return onecard(
            "calibration",
            "synthesize",
            model,
            out,
            "--recipe",
            use,
            "--calibration",
            talks,
            "--max-new-tokens",
            6,
            "--turns",
            2,
            "--device",
            "cpu",
            *arguments,
        )

    return run


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_both_ways_write_the_same(
    baby: Callable[..., Path], write: Callable[..., Result], tmp_path: Path, family: str
) -> None:
    said = []
    for way, name in (("--block-by-block", "walked"), ("", "loaded")):
        out = tmp_path / f"{name}.jsonl"
        result = write(baby(family), out, "--temperature", 0, *([way] if way else []))
        assert result.exit_code == 0, result.stderr
        line = json.loads(result.stdout)
        assert (line["block_by_block"], line["conversations"], line["answers"]) == (bool(way), 4, 8)
        documents = read_jsonl(out)
        said.append([document.messages for document in documents])
        assert all(json.loads(row)["synthesized"]["settings"] == line["digest"] for row in out.read_text().splitlines())
        assert "4 conversations, 2 turns" in result.stderr
        told = " ".join(result.stderr.split())
        assert "1 rows of talks.jsonl hold a text and a conversation" in told
        assert "4 of 6 calibration texts are conversations to be answered" in told
    assert ("walks over" in result.stderr) is False
    assert said[0] == said[1]
    asked = {message["content"] for messages in said[0] for message in messages or [] if message["role"] == "user"}
    assert asked == {f"why {word}?" for word in ("a", "abc", "not", "never")} | {"and then?"}
    assert any(message["content"] != "because" for messages in said[0] for message in messages or [])


@pytest.mark.parametrize("way", [["--block-by-block"], []])
def test_killed_and_resumed(
    copied: Callable[..., Path],
    write: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refuse,
    way: list[str],
) -> None:
    """Also days later, when the chat template would write another date."""
    from onecard.calibration import conversations

    model = copied()
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }}" + template.read_text())
    assert write(model, tmp_path / "whole.jsonl", *way).exit_code == 0
    out, count, whole = tmp_path / "out.jsonl", 0, conversations.Journal.keep

    def dies(self: Any, talks: Any, now: bool = False) -> None:
        nonlocal count
        count += 1
        whole(self, talks, True)
        if count == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(conversations.Journal, "keep", dies)
    assert write(model, out, *way).exit_code == 130
    assert not out.exists()
    monkeypatch.setattr(conversations.Journal, "keep", whole)
    days_later(monkeypatch, 9)
    refused(write(model, out, *way, "--seed", 5), "settings was", "--overwrite")
    result = write(model, out, *way)
    assert result.exit_code == 0, result.stderr
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {path.name for path in tmp_path.glob("out*")} == {"out.jsonl"}
    refused(write(model, out, *way), "exists", "--overwrite")
    assert write(model, out, *way, "--overwrite", "--seed", 5).exit_code == 0
    assert out.read_bytes() != (tmp_path / "whole.jsonl").read_bytes()


def test_what_cannot_be_written(
    baby: Callable[..., Path],
    copied: Callable[..., Path],
    write: Callable[..., Result],
    refused: Refuse,
    tmp_path: Path,
    jsonl: Callable[..., Path],
) -> None:
    model = baby("llama4-text")
    refused(write(model, tmp_path / "out.txt"), ".jsonl")
    refused(write(model, tmp_path / "none" / "out.jsonl"), "does not exist")
    plain = jsonl("plain.jsonl", [{"text": "only words"}])
    refused(write(model, tmp_path / "out.jsonl", "--calibration", plain), "no conversation")
    bare = copied()
    (bare / "chat_template.jinja").unlink()
    refused(write(bare, tmp_path / "out.jsonl"), "chat template")


def test_pick() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0])
    assert pick(logits, 0, 1) == 1
    drawn = [pick(logits, 1.0, seed) for seed in range(1500)]
    assert drawn == [pick(logits, 1.0, seed) for seed in range(1500)]
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / 1500
    torch.testing.assert_close(shares, torch.softmax(logits, 0), atol=0.05, rtol=0)
