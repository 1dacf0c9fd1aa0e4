"""Per-token results as a Parquet file, for comparing two runs token by token with any tool that reads Parquet.

One line for each predicted token, in the order of rows and positions. The file is written whole or not at all.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.layout import TEMPORARY
from ..core.rows import Row
from .kl import TokenResults


def columns(results: TokenResults, rows: list[Row]) -> dict[str, Any]:
    """Column -> a value for each token. `token` is the id of the true token, `position` its place in its row."""
    order = np.lexsort((results.position.numpy(), results.document.numpy()))
    document = results.document.numpy()[order]
    position = results.position.numpy()[order] + 1

    def by_row(values: list[str]) -> list[str]:
        return [values[n] for n in document]

    def plain(values: torch.Tensor) -> np.ndarray:
        return np.asarray(values.numpy()[order])

    return {
        "document": by_row([row.document for row in rows]),
        "document_digest": by_row([row.digest for row in rows]),
        "kind": by_row([row.kind for row in rows]),
        "source": by_row([row.parts[0].source if row.parts else "" for row in rows]),
        "position": position,
        "token": np.array([int(rows[d].tokens[p]) for d, p in zip(document, position, strict=True)]),
        "kl_nats": plain(results.kl_nats),
        "reverse_kl_nats": plain(results.reverse_kl_nats),
        "logp_reference": plain(results.logp_reference),
        "logp_quantized": plain(results.logp_quantized),
        "top1_reference": plain(results.top_reference[:, 0]),
        "top1_quantized": plain(results.top_quantized[:, 0]),
        "same_top1": plain(results.same_top1),
        "top5_overlap": plain(results.top_overlap),
    }


def write_tokens(path: Path, results: TokenResults, rows: list[Row]) -> None:
    """Write the columns as Parquet to `path`, replacing it at the end."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()  # our own bar is on the screen
    temporary = path.with_name(path.name + TEMPORARY)
    Dataset.from_dict(columns(results, rows)).to_parquet(temporary)
    temporary.replace(path)
