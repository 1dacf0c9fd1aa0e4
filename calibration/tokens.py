"""Documents -> token rows, in the model's own chat template and with its own image placeholders.

Calibration rows are packed: documents follow each other and are cut at a fixed length, so that no row is padded.
Evaluation rows are one document each, cut at the length; position 0 predicts token 1.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from ..core.errors import InputError, input_error
from ..core.rows import Row
from ..models.adapter import Adapter
from .documents import Document

# Pillow's numbers for resampling, as preprocessor_config.json stores them; 2 (bilinear) is Llama 4's.
_BILINEAR = 2


class Encoder:
    """Tokenizer, chat template and image preprocessing of one checkpoint folder. Runs no code of the checkpoint."""

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        self.adapter = adapter
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), config=adapter.config, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many kinds for a missing or damaged tokenizer
            raise InputError(
                f"{folder} has no tokenizer that transformers can load ({type(error).__name__}: {error})"
            ) from error

    def encode_all(self, documents: list[Document], skip_unusable: bool = False) -> list[Row]:
        """Every document's row. Raises one InputError that names all documents that this model cannot take;
        `skip_unusable` leaves them out, as long as others remain."""
        rows, problems = [], []
        for document in documents:
            try:
                rows.append(self._encode(document, False))
            except ValueError as error:
                problems.append(f"{document.id} {error}")
        if problems and not (skip_unusable and rows):
            shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
            raise input_error("the model cannot take these texts:", shown, "Leave them out, or mend them.")
        return rows

    def encode(self, document: Document, ask: bool = False) -> Row:
        """Token ids and pixels of one document, uncut; `ask` ends it where an answer begins. Raises InputError."""
        try:
            return self._encode(document, ask)
        except ValueError as error:
            raise InputError(f"{document.id} {error}") from None

    def _encode(self, document: Document, ask: bool) -> Row:
        """Raises ValueError with what is wrong with the document, InputError for what is wrong with the model."""
        if document.images and not self.adapter.has_vision:
            raise ValueError("has images, and this model has no vision tower")
        if document.text is not None:
            ids = self.tokenizer(document.text)["input_ids"]
        else:
            if not self.tokenizer.chat_template:
                raise ValueError(f"is a conversation, and {self.folder} has no chat template")
            try:
                text = self.tokenizer.apply_chat_template(document.messages, tokenize=False, add_generation_prompt=ask)
            except Exception as error:  # the template is a program of the checkpoint's, run in jinja2's sandbox
                raise ValueError(f"is refused by the chat template ({error})") from None
            if document.images:
                text = text.replace("<|image|>", self.adapter.image_text())
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if max(ids, default=0) >= self.adapter.vocab_size:
            raise InputError(
                f"the tokenizer in {self.folder} gives ids past the model's vocabulary: it is another model's"
            )
        if self.adapter.has_vision:
            promised = len(document.images) * self.adapter.image_token_count()
            if ids.count(self.adapter.image_token_id) != promised:
                raise ValueError("spells the marker of an image in its text")
        pixels = torch.stack([self._pixels(path) for path in document.images]) if document.images else None
        return Row(document.id, document.kind, torch.tensor(ids, dtype=torch.int64), pixels)

    def _settings(self) -> dict[str, Any]:
        path = self.folder / "preprocessor_config.json"
        if not path.exists():
            return {}
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            return {key: settings[key] for key in ("resample", "image_mean", "image_std", "rescale_factor")
                    if key in settings}  # fmt: skip
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): fetch the checkpoint again") from None

    def _pixels(self, path: Path) -> torch.Tensor:
        """One image as one tile: fp32 [3, S, S], resized, rescaled and normalised as preprocessor_config.json says."""
        settings = self._settings()
        side = int(self.adapter.config.vision_config.image_size)
        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB").resize((side, side), Image.Resampling(settings.get("resample", _BILINEAR)))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
            raise ValueError(f"has the image {path}, which cannot be read ({error})") from None
        values = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
        mean = torch.tensor(settings.get("image_mean", [0.5] * 3)).view(3, 1, 1)
        std = torch.tensor(settings.get("image_std", [0.5] * 3)).view(3, 1, 1)
        return (values.float() * float(settings.get("rescale_factor", 1 / 255)) - mean) / std


def pack_rows(encoded: list[Row], row_tokens: int, max_rows: int, seed: int) -> list[Row]:
    """Shuffle documents and cut their tokens into rows of exactly `row_tokens`.

    A document with images is never cut: it is put whole at the start of a later row (one longer than a row is left
    out). What does not fill a last row is dropped. Raises InputError when not one row can be filled.
    """
    order = list(encoded)
    random.Random(seed).shuffle(order)
    pictures = [row for row in order if row.pixels is not None and len(row.tokens) <= row_tokens]
    stream = torch.cat([row.tokens for row in order if row.pixels is None] or [torch.empty(0, dtype=torch.int64)])
    rows: list[Row] = []
    offset = 0
    per_row = -(-len(pictures) // max(1, max_rows))  # spread the pictures over the rows that are wanted
    while len(rows) < max_rows:
        parts: list[torch.Tensor] = []
        pixels: list[torch.Tensor] = []
        room = row_tokens
        for _ in range(per_row):
            if pictures and len(pictures[0].tokens) <= room:
                picture = pictures.pop(0)
                assert picture.pixels is not None
                parts.append(picture.tokens)
                pixels.append(picture.pixels)
                room -= len(picture.tokens)
        if len(stream) - offset < room:
            break
        parts.append(stream[offset : offset + room])
        offset += room
        name = f"packed-{len(rows):05d}"
        rows.append(Row(name, "packed", torch.cat(parts), torch.cat(pixels) if pixels else None))
    if not rows:
        total = sum(len(row.tokens) for row in encoded)
        raise InputError(
            f"the calibration texts hold {total:,} tokens and fill no row of {row_tokens:,}: give more text, or lower "
            "calibration_row_tokens in the recipe"
        )
    return rows


def distinct(encoded: list[Row]) -> list[Row]:
    """The first of all rows with the same tokens and pictures: a text that stands there twice is one draw, not two."""
    first: dict[bytes, Row] = {}
    for row in encoded:
        pixels = b"" if row.pixels is None else row.pixels.numpy().tobytes()
        first.setdefault(row.tokens.numpy().tobytes() + pixels, row)
    return list(first.values())


def document_rows(encoded: list[Row], row_tokens: int, max_rows: int) -> list[Row]:
    """One row a document, cut at `row_tokens`; documents under two tokens, or whose images would be cut, are left out.

    Raises InputError when none is left.
    """
    rows = []
    for row in encoded:
        if len(row.tokens) < 2 or (row.pixels is not None and len(row.tokens) > row_tokens):
            continue
        rows.append(Row(row.document, row.kind, row.tokens[:row_tokens], row.pixels))
        if len(rows) == max_rows:
            break
    if not rows:
        raise InputError("the evaluation texts hold no document of two tokens or more")
    return rows
