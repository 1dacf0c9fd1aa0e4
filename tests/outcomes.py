"""Token results as a twin walk gives them, without models: random logits of two models, row by row."""

from dataclasses import fields, replace

import torch

from onecard.core.rows import Part, Row
from onecard.eval.kl import TokenResults, compare, concatenate


def make_rows(lengths: list[int], vocab: int, seed: int = 0, kinds: tuple[str, ...] = ("prose", "code")) -> list[Row]:
    """One document a row, of random tokens. Kinds alternate, and so do two sources."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        kind, source = kinds[number % len(kinds)], f"source-{number % 2}"
        tokens = torch.randint(vocab, (length,), generator=generator)
        rows.append(Row(f"document-{number}", kind, tokens, None, (Part(f"document-{number}", kind, source, length),)))
    return rows


def make_results(
    rows: list[Row], vocab: int, seed: int = 1, scale: float = 3.0, noise: float = 0.3, order: list[int] | None = None
) -> TokenResults:
    """Results for every predicted token, in the given order of rows. The second model is the first one plus noise."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for number, row in enumerate(rows):
        p = scale * torch.randn(len(row.tokens) - 1, vocab, generator=generator)
        q = p + noise * torch.randn(p.shape, generator=generator)
        document = torch.full((len(p),), number)
        parts[number] = compare([(0, p, q)], row.tokens[1:], document, torch.arange(len(p)))
    return concatenate([parts[number] for number in (order or range(len(rows)))])


def with_values(results: TokenResults, **values: torch.Tensor) -> TokenResults:
    """The same tokens with other values in some columns."""
    return replace(results, **values)


def only(results: TokenResults, chosen: torch.Tensor) -> TokenResults:
    """The chosen tokens only; `chosen` is a mask (bool) or numbers (int64)."""
    return TokenResults(*(getattr(results, field.name)[chosen] for field in fields(TokenResults)))
