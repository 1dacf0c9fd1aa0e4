"""Texts that a model cannot take are refused by name; those that it can are encoded as it was trained to read them."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image

from babies import PATCH
from command_line import Refuse
from documents import SAMPLE, conversation, draw_picture, picture, words
from onecard.calibration.documents import Document
from onecard.calibration.sources import read_jsonl
from onecard.calibration.tokens import Encoder
from onecard.core.rows import Row
from onecard.models.families import load_adapter

# --- what a model can take


def test_pictures_for_a_model_that_cannot_see(
    baby: Callable[..., Path], refuse: Refuse, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    draw_picture(tmp_path / "cat.png")
    rows = [*SAMPLE, conversation(picture("cat.png")) | {"id": "cat"}, conversation(picture("cat.png")) | {"id": "dog"}]
    refuse(baby("qwen3"), "cat", "dog", "vision", arguments=["--evaluation", jsonl("pictures.jsonl", rows)])


def _png_of_a_billion_pixels() -> bytes:
    header = b"IHDR" + struct.pack(">II5B", 40_000, 30_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return start + header + struct.pack(">I", zlib.crc32(header)) + bytes(4) + b"IDAT"


@pytest.mark.parametrize("kind", ["no picture", "cut off", "a billion pixels"])
def test_damaged_pictures_are_all_named(
    baby: Callable[..., Path], refuse: Refuse, jsonl: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    Image.effect_noise((40, 40), 90).save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:400]
    content = {"no picture": b"GIF, or so", "cut off": cut, "a billion pixels": _png_of_a_billion_pixels()}[kind]
    for name in ("cat.png", "dog.png"):
        (tmp_path / name).write_bytes(content)
    rows = [*SAMPLE, *(conversation(picture(name)) for name in ("cat.png", "whole.png", "dog.png"))]
    refuse(baby("scout"), "cat.png", "dog.png", arguments=["--evaluation", jsonl("pictures.jsonl", rows)])


def test_damaged_picture_settings(
    copied: Callable[..., Path], refuse: Refuse, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied("scout")
    (model / "preprocessor_config.json").write_text("{")
    draw_picture(tmp_path / "cat.png")
    path = jsonl("pictures.jsonl", [conversation(picture("cat.png"))])
    refuse(model, "preprocessor_config.json", arguments=["--evaluation", path])


def test_a_conversation_that_the_template_refuses(
    baby: Callable[..., Path], refuse: Refuse, jsonl: Callable[..., Path]
) -> None:
    """Chat templates refuse some roles and orders of turns. The message names every such document, with the template's
    words."""
    rows = [
        *SAMPLE,
        *({"messages": [{"role": "wizard", "content": "abracadabra"}], "id": i} for i in ("spell", "curse")),
    ]
    path = jsonl("wizards.jsonl", rows)
    refuse(baby("llama4-text"), "spell", "curse", "only user and assistant may speak", arguments=["--evaluation", path])


def test_conversations_without_a_template(
    copied: Callable[..., Path], refuse: Refuse, jsonl: Callable[..., Path]
) -> None:
    model = copied()
    (model / "chat_template.jinja").unlink()
    rows = [*SAMPLE, *({"messages": [{"role": "user", "content": "hello"}], "id": i} for i in ("talk", "chat"))]
    refuse(model, "talk", "chat", "chat template", arguments=["--evaluation", jsonl("talks.jsonl", rows)])


MARKERS = ["<|patch|>", "<|image|>", "<|image_start|><|image|><|image_end|>"]


@pytest.mark.parametrize("marker", MARKERS)
def test_a_text_that_spells_an_image_marker(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    refused: Refuse,
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
    marker: str,
) -> None:
    """Texts about such models spell their image markers. Beside pictures in the same row they are read as plain words,
    or refused by name; never a traceback."""
    draw_picture(tmp_path / "cat.png")
    question = conversation(picture("cat.png"), words(f"what is a {marker}?"))
    answer = conversation(picture("cat.png"), words(f"a {marker} is a word."))
    told = [{"text": f"{n}: an image is {marker} in the text, as everybody knows", "id": f"told-{n}"} for n in range(9)]
    calibration = jsonl("calibration.jsonl", [conversation(picture("cat.png")), *told, question])
    evaluation = jsonl("evaluation.jsonl", [answer | {"id": "answer"}, *SAMPLE])
    use = recipe(calibration_row_tokens=48, evaluation_row_tokens=48)
    result = onecard(
        "quantize",
        baby("scout"),
        tmp_path / "out",
        "--recipe",
        use,
        "--calibration",
        calibration,
        "--evaluation",
        evaluation,
    )
    if result.exit_code:
        refused(result, "answer")


# --- encoding


@pytest.fixture
def encoder(baby: Callable[..., Path]) -> Encoder:
    return Encoder(baby("scout"), load_adapter(baby("scout")))


def spelled(encoder: Encoder, row: Row) -> str:
    return str(encoder.tokenizer.decode(row.tokens))


def test_encode_text_and_conversation(encoder: Encoder) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [words("yo")]}]
    assert spelled(encoder, encoder.encode(Document("d", "text", "hi", None))) == "<s>hi"
    assert spelled(encoder, encoder.encode(Document("d", "text", None, talk))) == "<s><|user|>hi<|assistant|>yo"
    asked = encoder.encode(Document("d", "text", None, talk[:1]), ask=True)
    assert spelled(encoder, asked) == "<s><|user|>hi<|assistant|>"
    assert asked.pixels is None


def test_encode_pictures(encoder: Encoder, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """One tile for each image: a placeholder for each feature, and pixels as the settings say, red first."""
    draw_picture(tmp_path / "red.png", "red")
    draw_picture(tmp_path / "blue.png", "blue")
    row = conversation(picture("red.png"), words("or"), picture("blue.png"))
    (document,) = read_jsonl(jsonl("x.jsonl", [row]))
    encoded = encoder.encode(document)
    count = encoder.adapter.image_token_count()
    tile = "<|image_start|><|image|>" + "<|patch|>" * count + "<|image_end|>"
    assert spelled(encoder, encoded) == f"<s><|user|>{tile}or{tile}"
    assert int((encoded.tokens == PATCH).sum()) == 2 * count
    assert encoded.pixels is not None
    side = encoder.adapter.config.vision_config.image_size
    assert encoded.pixels.shape == (2, 3, side, side)
    # Mean and deviation of 0.5 take 0..1 to -1..1.
    expected = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])[:, :, None, None].expand(2, 3, side, side)
    torch.testing.assert_close(encoded.pixels, expected)
