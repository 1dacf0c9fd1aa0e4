"""Small drawings with captions: digits and shapes in one of six colours, on a grey, noisy ground.

A seeded generator decides object, place, size and ground, so held-out pictures are new drawings of known things. A
caption is right when colour and object are both right; chance is one in 90. The arithmetic from a picture to the
model's input is here too, because transformers' image processor needs torchvision, which is not installed. For a
picture of the right size it agrees with preprocessor_config.json; any other size is refused. numpy and Pillow only.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32  # pixels of a side: one tile, four patch tokens after the pixel shuffle
COLOURS = {
    "red": (215, 35, 35),
    "green": (30, 150, 50),
    "blue": (40, 70, 215),
    "yellow": (235, 220, 40),
    "purple": (140, 40, 170),
    "orange": (245, 140, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIGITS = tuple("0123456789")
# Most pixels off the middle. Anywhere on the tile, digits would take hours to learn.
JITTER = 2
QUESTIONS = ("What is in the picture?", "What do you see?", "Describe the image.", "What is shown here?")


def caption(thing: str, colour: str) -> str:
    if thing in DIGITS:
        return f"the digit {thing} in {colour}"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing}"


def _shape(pen: ImageDraw.ImageDraw, thing: str, box: tuple[int, int, int, int], ink: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    if thing == "circle":
        pen.ellipse(box, fill=ink)
    elif thing == "ring":
        pen.ellipse(box, outline=ink, width=max(2, (right - left) // 6))
    elif thing == "square":
        pen.rectangle(box, fill=ink)
    elif thing == "triangle":
        pen.polygon([((left + right) // 2, top), (right, bottom), (left, bottom)], fill=ink)
    else:
        wide = max(2, (right - left) // 4)
        across, down = (top + bottom) // 2, (left + right) // 2
        pen.line([(left, across), (right, across)], fill=ink, width=wide)
        pen.line([(down, top), (down, bottom)], fill=ink, width=wide)


def draw(rng: random.Random) -> tuple[Image.Image, str]:
    """One picture and its caption."""
    thing = rng.choice((*SHAPES, *DIGITS))
    colour = rng.choice(tuple(COLOURS))
    red, green, blue = (min(255, max(0, part + rng.randint(-12, 12))) for part in COLOURS[colour])
    ink = (red, green, blue)
    grey = rng.choice((rng.randint(0, 60), rng.randint(190, 255)))
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-8, 9, (SIZE, SIZE, 1))
    ground = np.clip(grey + noise, 0, 255).astype(np.uint8).repeat(3, axis=2)
    image = Image.fromarray(ground)
    pen = ImageDraw.Draw(image)
    if thing in DIGITS:
        font = ImageFont.load_default(rng.randint(30, 36))
        left, top, right, bottom = (int(edge) for edge in pen.textbbox((0, 0), thing, font=font))
        x = (SIZE - left - right) // 2 + rng.randint(-JITTER, JITTER)
        y = (SIZE - top - bottom) // 2 + rng.randint(-JITTER, JITTER)
        pen.text((x, y), thing, fill=ink, font=font)
    else:
        side = rng.randint(17, 25)
        x = (SIZE - side) // 2 + rng.randint(-JITTER, JITTER)
        y = (SIZE - side) // 2 + rng.randint(-JITTER, JITTER)
        _shape(pen, thing, (x, y, x + side, y + side), ink)
    return image, caption(thing, colour)


def pixels(image: Image.Image) -> np.ndarray:
    """float32 [3, 32, 32] in -1 to 1: rescaled by 1/255, mean and standard deviation 0.5."""
    if image.size != (SIZE, SIZE):
        raise ValueError(f"a demo picture is {SIZE} x {SIZE} pixels, not {image.size[0]} x {image.size[1]}")
    values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return ((values - 0.5) / 0.5).transpose(2, 0, 1)


def load(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return pixels(image)


def messages(question: str, answer: str, path: str = "") -> list[dict[str, Any]]:
    """The two turns of a captioned picture."""
    parts = [{"type": "image", "path": path}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
