"""Encodes documents as token rows, with the model's own chat template and image placeholders.

Each document becomes one uncut row. packing.py makes the rows of a run from them.
"""

import copy
import datetime as dates
import io
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import InputError, input_error
from ..core.rows import Part, Row
from ..models.adapter import Adapter
from .documents import Document, Picture
from .pieces import token_ids
from .templates import ChatTemplate

# The files of which a tokenizer has one.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
# Pillow's number for bilinear resampling, as preprocessor_config.json stores it; Llama 4's choice.
_BILINEAR = 2


Three = tuple[float, float, float]


class _PictureSettings(BaseModel):
    """The keys of an image processor's config that a picture of one tile depends on, with Llama 4's values."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    resample: int = Field(default=_BILINEAR, ge=0, le=max(Image.Resampling))
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Three = (0.5, 0.5, 0.5)
    image_std: Three = (0.5, 0.5, 0.5)


class Encoder:
    """The tokenizer, chat template and image preprocessing of a checkpoint folder. Runs none of its code."""

    def __init__(self, folder: Path, adapter: Adapter, date: dates.date | None = None) -> None:
        """`date`: what a chat template that asks for the date is told. None: today. Raises InputError."""
        from transformers import AutoTokenizer

        self.folder = folder
        self.adapter = adapter
        if not any(path for pattern in VOCABULARIES for path in folder.glob(pattern)):
            # transformers would make an empty tokenizer of the family.
            raise InputError(f"{folder} has no tokenizer: put the model's own files there (tokenizer.json and others)")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), config=adapter.config, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many exception types for a missing or damaged tokenizer
            raise InputError(
                f"{folder} has no tokenizer that transformers can load ({type(error).__name__}: {error})"
            ) from error
        # Fewer tokens than rows are common: the rest is padding.
        tokens, rows = max(self.tokenizer.get_vocab().values(), default=-1) + 1, adapter.vocab_size
        if tokens > rows:
            raise InputError(
                f"the tokenizer in {folder} gives ids up to {tokens - 1:,}, and the embedding has {rows:,} rows "
                "(vocab_size): put the model's own tokenizer there"
            )
        self.date = date or dates.date.today()
        self.template = ChatTemplate(self.tokenizer, self.date)

    def of(self, adapter: Adapter) -> "Encoder":
        """The same tokenizer for `adapter`, which is of the same model but may lack the vision tower."""
        other = copy.copy(self)
        other.adapter = adapter
        return other

    def encode_all(self, documents: list[Document]) -> list[Row]:
        """One row for each document. Raises one InputError that names all that this model cannot take."""
        rows, problems = self._encoded(documents)
        _refuse(list(problems.values()))
        return rows

    def encode_usable(self, documents: list[Document]) -> tuple[list[Row], list[str]]:
        """(the rows, what is wrong with the documents that were left out). Borrowed documents are left out if others
        remain. Raises one InputError that names the rest."""
        rows, problems = self._encoded(documents)
        _refuse([wrong for k, wrong in problems.items() if not rows or not documents[k].borrowed])
        return rows, list(problems.values())

    def _encoded(self, documents: list[Document]) -> tuple[list[Row], dict[int, str]]:
        """(the rows, the document's number -> what is wrong with it)."""
        rows, problems = list[Row](), dict[int, str]()
        for number, document in enumerate(documents):
            try:
                rows.append(self._encode(document, False))
            except ValueError as error:
                problems[number] = f"{document.id} {error}"
        return rows, problems

    def encode(self, document: Document, ask: bool = False) -> Row:
        """The uncut row of a document: token ids int64 [T], pixels fp32 [images, 3, S, S] or None.

        `ask` ends it where the assistant's answer begins. Raises InputError.
        """
        try:
            return self._encode(document, ask)
        except ValueError as error:
            raise InputError(f"{document.id} {error}") from None

    def _encode(self, document: Document, ask: bool) -> Row:
        """Raises ValueError about the document, InputError about the checkpoint."""
        if document.images and not self.adapter.has_vision:
            raise ValueError("has images, and this model has no vision tower")
        if document.text is not None:
            ids_T = self._text_ids(document.text)
        else:
            if not self.tokenizer.chat_template:
                raise ValueError(f"is a conversation, and {self.folder} has no chat template")
            text = self.template.write(document.messages or [], document.tools, ask)
            if document.images:
                text = text.replace("<|image|>", self.adapter.image_text())
            ids_T = token_ids(self.tokenizer, text, specials=False)
        if self.adapter.has_vision:
            promised = len(document.images) * self.adapter.image_token_count()
            placed = int(torch.eq(ids_T, self.adapter.image_token_id or 0).sum())
            if placed < promised:
                raise ValueError("has pictures that the chat template does not write")
            if placed > promised:
                raise ValueError("spells the marker of an image in its text")
        pixels = torch.stack([self._pixels(picture) for picture in document.images]) if document.images else None
        parts = (Part(document.id, document.kind, document.source, len(ids_T)),)
        return Row(document.id, document.kind, ids_T, pixels, parts)

    def _text_ids(self, text: str) -> torch.Tensor:
        """The ids of a text, int64 [T]. One that is written with its BOS gets no second one."""
        ids_T = token_ids(self.tokenizer, text, specials=True)
        bos = self.tokenizer.bos_token_id
        twice = bos is not None and text.startswith(self.tokenizer.bos_token) and ids_T[:2].tolist() == [bos, bos]
        return ids_T[1:] if twice else ids_T

    @cached_property
    def _settings(self) -> _PictureSettings:
        """What the folder says of pictures. transformers 5 saves it in processor_config.json, and reads that first."""
        for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
            path = self.folder / name
            try:
                stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                stored = stored.get(part) if part is not None else stored
                if stored:
                    return _PictureSettings.model_validate({k: v for k, v in stored.items() if v is not None})
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                said = str(error).partition("\n")[0]
                raise InputError(f"{path} is damaged ({said}): fetch the checkpoint again") from None
        return _PictureSettings()

    def _pixels(self, picture: Picture) -> torch.Tensor:
        """A picture as one tile, fp32 [3, S, S]: resized, rescaled and normalised as the folder says."""
        settings = self._settings
        side = int(self.adapter.config.vision_config.image_size)
        try:
            with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
                rgb = image.convert("RGB").resize((side, side), Image.Resampling(settings.resample))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
            if isinstance(picture, bytes):  # Pillow's message would name an object in memory
                raise ValueError("has an image, which cannot be read") from None
            raise ValueError(f"has the image {picture}, which cannot be read ({error})") from None
        values = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
        rescaled = values.float() * (settings.rescale_factor if settings.do_rescale else 1)
        if not settings.do_normalize:
            return rescaled
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (settings.image_mean, settings.image_std))
        return (rescaled - mean) / std


def _refuse(problems: list[str]) -> None:
    """Raises InputError for texts that the model cannot take."""
    if problems:
        raise input_error("the model cannot take these texts:", problems, "Leave them out, or mend them.", most=20)
