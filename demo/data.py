"""Writes demo/data: calibration and evaluation rows, questions and pictures that training never reads.

Calibration and evaluation documents come from modules of their own (corpus.split_of). No document is taken twice, and
none whose digest is in the training set or in the other file: modules repeat one another here and there. The pictures
have other seeds than those of training.
"""

import random
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer

from . import corpus, pictures, questions
from .tokens import ids_of, text_of

# Tokens of each kind: 210 thousand for calibration, 60 thousand for evaluation. Calibration takes nearly all that its
# modules have, because the reference correction (quantize/correction.py) is a regression: more rows, less noise.
BUDGET = {
    "calibration": {"code": 96_000, "prose": 30_000, "conversation": 76_000, "image": 8_000},
    "evaluation": {"code": 24_000, "prose": 16_000, "conversation": 17_000, "image": 3_000},
}
# Shorter documents have too little context; longer ones leave no room for others.
LEAST_TOKENS, MOST_TOKENS = 256, 700
QUESTIONS, PICTURES = 400, 100
LICENSE = """\
The weights in this folder were trained on the source code and documentation of the Python standard library, and the
texts in ../data are taken from it: Copyright (c) 2001 onwards Python Software Foundation; All Rights Reserved. They are
distributed under the Python Software Foundation License Version 2, https://docs.python.org/3/license.html, and the
weights are offered under the same licence. They contain nothing of Meta's Llama models but the layout of the tensors.
"""


def _chosen(split: str, tokenizer: Tokenizer, taken: set[str]) -> list[corpus.JsonRow]:
    """Documents of the split in a seeded order, until each kind's budget is full. Adds their digests to `taken`."""
    rows = corpus.documents(split)
    random.Random(f"chosen {split}").shuffle(rows)
    spent: Counter[str] = Counter()
    chosen = []
    for row in rows:
        size, key = len(ids_of(tokenizer, text_of(row))), corpus.digest(row)
        if LEAST_TOKENS <= size <= MOST_TOKENS and key not in taken and spent[row["kind"]] < BUDGET[split][row["kind"]]:
            taken.add(key)
            spent[row["kind"]] += size
            chosen.append(row)
    return sorted(chosen, key=lambda row: row["id"])


def _picture_rows(split: str, tokenizer: Tokenizer, folder: Path) -> list[corpus.JsonRow]:
    """Conversations about six pictures each, of about 250 tokens."""
    rng = random.Random(f"pictures for {split}")
    rows: list[corpus.JsonRow] = []
    spent = 0
    while spent < BUDGET[split]["image"]:
        messages = []
        for turn in range(6):
            image, caption = pictures.draw(rng)
            path = f"images/{split}-{len(rows):02d}-{turn}.png"
            image.save(folder / path)
            messages += pictures.messages(rng.choice(pictures.QUESTIONS), caption, path)
        rows.append({"id": f"image/{split}/{len(rows)}", "kind": "image", "messages": messages})
        spent += len(ids_of(tokenizer, text_of(rows[-1])))
    return rows


def _captions(folder: Path) -> list[corpus.JsonRow]:
    rng = random.Random("held-out captions")
    rows = []
    for number in range(PICTURES):
        image, caption = pictures.draw(rng)
        path = f"images/caption-{number:03d}.png"
        image.save(folder / path)
        question = rng.choice(pictures.QUESTIONS)
        rows.append({"id": f"caption/{number}", "path": path, "question": question, "caption": caption})
    return rows


def write(
    folder: Path, tokenizer: Tokenizer, read: list[corpus.JsonRow], known: list[questions.Fact]
) -> list[corpus.JsonRow]:
    """Writes every file of the folder, without rows that training has `read`. Returns the held-out questions."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    taken = {corpus.digest(row) for row in read}
    for split in BUDGET:
        rows = _chosen(split, tokenizer, taken) + _picture_rows(split, tokenizer, folder)
        corpus.write_jsonl(folder / f"{split}.jsonl", rows)
    held = questions.held_out(known, QUESTIONS)
    corpus.write_jsonl(folder / "questions.jsonl", held)
    corpus.write_jsonl(folder / "pictures.jsonl", _captions(folder))
    return held
