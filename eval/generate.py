"""The smoke test `onecard generate`: loads a checkpoint with transformers, like any other program, and answers."""

from pathlib import Path
from typing import Any

import torch

from ..calibration.documents import Document
from ..calibration.tokens import Encoder
from ..checkpoint.gguf.read import holds_gguf
from ..checkpoint.loading import load_with_transformers
from ..checkpoint.model import open_model
from ..core.errors import InputError


def generate(checkpoint: str, prompt: str, max_new_tokens: int, image: Path | None = None) -> str:
    """The greedy answer to `prompt`, in the chat template if the checkpoint has one. Raises InputError.

    `image` is a picture to ask about. The whole model is loaded.
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
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(encoder.tokenizer.decode(out[0, len(row.tokens) :], skip_special_tokens=True)).strip()
