"""Documents as lines of JSONL: plain texts, conversations, pictures and questions."""

import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from onecard.calibration.documents import Document
from onecard.calibration.source import ReadLimit, Source
from onecard.calibration.sources import read_source

SAMPLE = [{"text": f"a text of many words, number {n}, to be read"} for n in range(9)]


def conversation(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def picture(path: object) -> dict[str, str]:
    return {"type": "image", "path": str(path)}


def draw_picture(path: Path, colour: str = "red") -> Path:
    Image.new("RGB", (20, 12), colour).save(path)
    return path


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


ITEMS = [
    {
        "id": f"item-{n}",
        "question": f"what is {'abcdefgh'[n % 8] * (n % 5 + 1)}?",
        "choices": ["a", "b", "c d", "efg"],
        "answer": n % 4,
    }
    for n in range(40)
]


def read_documents(path: Path, **changes: Any) -> list[Document]:
    """The documents of one file or folder; `changes` are further fields of Source."""
    return read_source(Source(path.name, path, **changes), ReadLimit(), None).documents
