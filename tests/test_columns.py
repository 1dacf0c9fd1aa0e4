"""Columns of data sets become documents: mappings, conversations in several spellings, and pictures."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image

from command_line import Refuse
from documents import parquet, png, read_documents
from onecard.calibration.columns import Columns, document_from
from onecard.calibration.documents import Document, document_of, spelled

SHAREGPT = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]
MAPPINGS: dict[str, tuple[dict[str, Any], Columns]] = {
    "ShareGPT": ({"conversations": SHAREGPT}, Columns()),
    "keys of its own": (
        {"talk": [{"who": "user", "says": "why?"}, {"who": "assistant", "says": "because"}]},
        Columns("talk", role_key="who", content_key="says"),
    ),
    "prompt and response": ({"q": "why?", "a": "because"}, Columns(prompt_column="q", response_column="a")),
    "turns": ({"texts": [{"user": "why?", "assistant": "because", "source": "x"}]}, Columns("texts")),
    "usual": (
        {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]},
        Columns(),
    ),
}


def said(document: Document) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in document.messages or []]


@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns(tmp_path: Path, kind: str, suffix: str) -> None:
    row, columns = MAPPINGS[kind]
    path = tmp_path / f"x.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        parquet(path, [row])
    (document,) = read_documents(path, columns=columns)
    assert said(document) == [("user", "why?"), ("assistant", "because")]


def pictured(row: dict[str, Any], columns: Columns) -> tuple[list[list[str]], tuple[bytes, ...]]:
    document = document_from(row, columns, "x", None, "s", None)
    words = [[p.get("text", "<>") for p in m["content"]] for m in document.messages or []]
    return words, tuple(p if isinstance(p, bytes) else p.read_bytes() for p in document.images)


def test_pictures_in_columns() -> None:
    """Pictures come as bytes, as a dict with bytes, or decoded. They go to their marks, or before the text."""
    red, blue = png("red"), png("blue")
    turns = [{"user": "what?", "assistant": "red"}, {"user": "sure?", "assistant": "yes"}]
    columns = Columns("texts", image_column="images")
    words = [["<>", "<>", "what?"], ["red"], ["sure?"], ["yes"]]
    assert pictured({"images": [{"bytes": red, "path": None}, blue], "texts": turns}, columns) == (words, (red, blue))
    marked = [{"from": "human", "value": "<image>\nwhat? and <image>"}, {"from": "gpt", "value": "two"}]
    columns = Columns("conversations", image_column="image")
    words = [["<>", "\nwhat? and ", "<>"], ["two"]]
    assert pictured({"image": [red, blue], "conversations": marked}, columns) == (words, (red, blue))
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "see ", "x": None}, {"type": "image", "text": None}]}
    ]
    assert pictured({"i": red, "messages": parts}, Columns(image_column="i")) == ([["see ", "<>"]], (red,))
    words, (decoded,) = pictured({"i": Image.open(io.BytesIO(red)), "text": "a red tile"}, Columns(image_column="i"))
    assert words == [["<>"], ["a red tile"]]
    assert Image.open(io.BytesIO(decoded)).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="2 images and 1 places"):
        pictured(
            {"i": [red, blue], "conversations": [{"from": "human", "value": "<image>?"}]}, Columns(image_column="i")
        )
    with pytest.raises(ValueError, match="more marks"):
        pictured({"i": red, "conversations": [{"from": "human", "value": "<image><image>"}]}, Columns(image_column="i"))


def test_a_picture_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    here = {"type": "image", "path": "a.png"}
    inside = {"type": "image", "data": base64.b64encode(png()).decode()}
    one, two = (
        document_of({"messages": [{"role": "user", "content": [part]}]}, "x", tmp_path) for part in (here, inside)
    )
    other = document_of(spelled(one), "x", None)
    assert one.digest == two.digest == other.digest
    assert (
        document_of({"messages": [{"role": "user", "content": [inside | {"data": "////"}]}]}, "x", None).digest
        != one.digest
    )
    with pytest.raises(ValueError, match="base64"):
        document_of({"messages": [{"role": "user", "content": [{"type": "image", "data": "?"}]}]}, "x", None)
    with pytest.raises(ValueError, match="no folder"):
        document_of({"messages": [{"role": "user", "content": [here]}]}, "x", None)


def test_wrong_columns(
    baby: Callable[..., Path],
    refused: Refuse,
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The message names the missing columns and the existing ones, half pairs, and wrong keys of a mixture."""
    path = parquet(tmp_path / "x.parquet", [{"question": "why?", "reply": "because"}])
    mapping = {"source": str(path), "prompt_column": "question", "response_column": "answer"}
    bare = ["--evaluation", parquet(tmp_path / "e.parquet", [{"text": "held out"}])]
    for texts, needles in (
        ({"source": str(path)}, ["any of text, messages", "question, reply"]),
        (mapping, ["no column answer", "question, reply"]),
        ({"source": str(path), "column": "question", "role_key": 5}, ["role_key"]),
        ({"source": str(path), "prompt_column": "question"}, ["prompt_column and response_column"]),
        ({"split": "test", "mixture": [{"source": "demo"}]}, ["move split into its entries"]),
        ({"mixture": []}, ["mixture is empty"]),
        ({"mixture": [{"source": "demo", "wait": 1}, {"weight": 0}]}, ["mixture.0.wait: unknown", "mixture.1.weight"]),
    ):
        use = recipe(calibration=texts)
        refused(onecard("calibration", "show", baby("llama4-text"), "--recipe", use, *bare), *needles)
