"""Training rows of the demo model: 512 tokens each, packed from documents, questions and captioned pictures.

Text rows are a stream of shuffled documents, cut every 512 tokens. Question rows and picture rows hold whole
conversations only, padded at the end. Answers and captions weigh more in the loss than running text, because they are
few. Everything is drawn from seeded generators before training starts, so a step's batch depends only on the seed and
the step's number.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from . import corpus, pictures, questions
from .tokens import IMAGE, SPECIAL_TOKENS, ids_of, render, text_of

ROW_TOKENS = 512
# Loss weight of the tokens of answers and captions. A higher one learns facts faster and text more slowly.
ANSWER_WEIGHT = 3.0
# Loss weight of the tokens before them: templates and drawn options are not worth learning.
PROMPT_WEIGHT = 0.1
PAD = SPECIAL_TOKENS.index("<|finetune_right_pad|>")


@dataclass(frozen=True)
class Pack:
    """One row: tokens, each token's weight as a target, and the numbers of its pictures in order."""

    tokens: np.ndarray  # int16 [512]
    weights: np.ndarray  # float32 [512]
    pictures: tuple[int, ...] = ()


def _answer_weights(tokenizer: Tokenizer, messages: list[corpus.JsonRow]) -> tuple[list[int], list[float]]:
    """Tokens and weights of one question and its answer."""
    whole = ids_of(tokenizer, render(messages))
    prompt = ids_of(tokenizer, render(messages[:-1], generate=True))
    assert whole[: len(prompt)] == prompt
    return whole, [PROMPT_WEIGHT] * len(prompt) + [ANSWER_WEIGHT] * (len(whole) - len(prompt))


def _pack(pieces: Sequence[tuple[list[int], list[float], int | None]]) -> list[Pack]:
    """Puts whole pieces into rows, in order."""
    packs: list[Pack] = []
    tokens: list[int] = []
    weights: list[float] = []
    numbers: list[int] = []
    for piece, piece_weights, number in [*pieces, ([PAD] * (ROW_TOKENS + 1), [], None)]:
        if len(tokens) + len(piece) > ROW_TOKENS:
            room = ROW_TOKENS - len(tokens)
            row = np.array(tokens + [PAD] * room, dtype=np.int16)
            packs.append(Pack(row, np.array(weights + [0.0] * room, dtype=np.float32), tuple(numbers)))
            tokens, weights, numbers = [], [], []
        tokens, weights = tokens + piece, weights + piece_weights
        numbers += [] if number is None else [number]
    return packs


def text_packs(tokenizer: Tokenizer, rows: list[corpus.JsonRow], count: int, seed: int) -> list[Pack]:
    """`count` rows of running text. The documents are shuffled again for every pass over them."""
    rng = random.Random(f"text {seed}")
    encoded = [np.array(ids_of(tokenizer, text_of(row)), dtype=np.int16) for row in rows]
    total_tokens = sum(len(ids) for ids in encoded)
    stream: list[np.ndarray] = []
    for _ in range(count * ROW_TOKENS // total_tokens + 1):
        rng.shuffle(encoded)
        stream += encoded
    flat = np.concatenate(stream)[: count * ROW_TOKENS].reshape(count, ROW_TOKENS)
    return [Pack(row, np.ones(ROW_TOKENS, dtype=np.float32)) for row in flat]


def question_packs(
    tokenizer: Tokenizer, facts: list[questions.Fact], held: list[corpus.JsonRow], items: int
) -> list[Pack]:
    pieces = []
    for row in questions.training_items(facts, held, items):
        pieces.append((*_answer_weights(tokenizer, questions.messages(row, row["answer"])), None))
    return _pack(pieces)


def picture_packs(tokenizer: Tokenizer, count: int, seed: int) -> tuple[list[Pack], torch.Tensor]:
    """Rows with `count` drawings, and the drawings' pixels as uint8 [count, 32, 32, 3].

    Half of the pictures continue the conversation before them, as in the calibration and evaluation rows.
    """
    rng = random.Random(f"pictures {seed}")
    drawn = np.empty((count, pictures.SIZE, pictures.SIZE, 3), dtype=np.uint8)
    pieces = []
    for number in range(count):
        image, caption = pictures.draw(rng)
        drawn[number] = np.asarray(image)
        tokens, weights = _answer_weights(tokenizer, pictures.messages(rng.choice(pictures.QUESTIONS), caption))
        if number and rng.random() < 0.5:  # continues the conversation before it: no second <|begin_of_text|>
            tokens, weights = tokens[1:], weights[1:]
        pieces.append((tokens, weights, number))
    assert IMAGE.count("<|patch|>") == 4
    return _pack(pieces), torch.from_numpy(drawn)
