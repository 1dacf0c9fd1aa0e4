"""The smoke test `onecard generate`: loads a checkpoint with transformers, like any other program, and answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..calibration.decode import BlockDecoder
from ..calibration.documents import Document
from ..calibration.tokens import Encoder
from ..checkpoint.gguf.read import holds_gguf
from ..checkpoint.loading import load_with_transformers
from ..checkpoint.model import Model, open_model
from ..core.device import Compute
from ..core.errors import InputError, NonfiniteError, OnecardError, UnusableModelError
from ..core.finite import all_finite, nonfinite_error
from ..core.rows import Row
from ..models.walk import Walk


class _Watched(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Ends the generation at the first logits that are not finite. Only then does our own walk look for the place."""

    def __init__(self, opened: Model, row: Row) -> None:
        self.opened, self.row = opened, row

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Some logits may be -inf on purpose: a generation config can forbid tokens.
        if not all_finite(scores.amax(-1)):
            raise self._fault(input_ids[0])
        return scores

    def _fault(self, tokens: torch.Tensor) -> OnecardError:
        compute = Compute(torch.device("cpu"), torch.float32, len(tokens))
        original = not self.opened.quantized
        walk = replace(Walk.over(self.opened.adapter, self.opened.source, compute), original=original)
        try:
            BlockDecoder(walk, [replace(self.row, tokens=tokens.cpu())]).next_logits([0])
        except (NonfiniteError, UnusableModelError) as error:
            return error
        return nonfinite_error(original, "the logits that transformers computes; in float32 they are finite")


def generate(checkpoint: str, prompt: str, max_new_tokens: int, image: Path | None = None) -> str:
    """The greedy answer to `prompt`, in the chat template if the checkpoint has one.

    `image` is a picture to ask about. The whole model is loaded. Raises InputError, and NonfiniteError for a quantized
    model whose logits are not finite: the likeliest of them would be some token all the same.
    """
    opened = open_model(checkpoint)
    if holds_gguf(opened.path):
        raise InputError(
            f"{checkpoint} holds GGUF, and transformers needs safetensors: ask llama.cpp, or make a folder for "
            "transformers with `onecard export --format bf16`"
        )
    encoder = Encoder(opened.path, opened.adapter)
    if image is not None and not image.is_file():
        raise InputError(f"the picture {image} does not exist")
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    if image is not None:
        parts.insert(0, {"type": "image", "path": str(image)})
    content: Any = parts if image is not None else prompt
    if encoder.tokenizer.chat_template or image is not None:
        document = Document("prompt", "prompt", None, [{"role": "user", "content": content}], (image,) if image else ())
    else:
        document = Document("prompt", "prompt", prompt, None)
    row = encoder.encode(document, ask=True)
    model = load_with_transformers(opened.path)
    inputs: dict[str, Any] = {"input_ids": row.tokens[None], "attention_mask": torch.ones_like(row.tokens[None])}
    if row.pixels is not None:
        inputs["pixel_values"] = row.pixels.to(model.dtype)
    watched = LogitsProcessorList([_Watched(opened, row)])
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=watched)
    return str(encoder.tokenizer.decode(out[0, len(row.tokens) :], skip_special_tokens=True)).strip()
