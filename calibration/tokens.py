"""Documents -> token rows, in the model's own chat template and with its own image placeholders.

A document becomes one row, uncut; calibration/packing.py makes the rows of a run of them.
"""

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from ..core.errors import InputError, input_error
from ..core.rows import Part, Row
from ..models.adapter import Adapter
from .documents import Document, Picture

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
        pixels = torch.stack([self._pixels(picture) for picture in document.images]) if document.images else None
        parts = (Part(document.id, document.kind, document.source, len(ids)),)
        return Row(document.id, document.kind, torch.tensor(ids, dtype=torch.int64), pixels, parts)

    def _settings(self) -> dict[str, Any]:
        path = self.folder / "preprocessor_config.json"
        if not path.exists():
            return {}
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            return {
                key: settings[key]
                for key in ("resample", "image_mean", "image_std", "rescale_factor")
                if key in settings
            }
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): fetch the checkpoint again") from None

    def _pixels(self, picture: Picture) -> torch.Tensor:
        """One image as one tile: fp32 [3, S, S], resized, rescaled and normalised as preprocessor_config.json says."""
        settings = self._settings()
        side = int(self.adapter.config.vision_config.image_size)
        try:
            with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
                rgb = image.convert("RGB").resize((side, side), Image.Resampling(settings.get("resample", _BILINEAR)))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
            which = "an image" if isinstance(picture, bytes) else f"the image {picture}"
            raise ValueError(f"has {which}, which cannot be read ({error})") from None
        values = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
        mean = torch.tensor(settings.get("image_mean", [0.5] * 3)).view(3, 1, 1)
        std = torch.tensor(settings.get("image_std", [0.5] * 3)).view(3, 1, 1)
        return (values.float() * float(settings.get("rescale_factor", 1 / 255)) - mean) / std
