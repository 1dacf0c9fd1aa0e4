"""The inputs of every peer and of the judge, prepared once for each model by our own reader and encoder.

build/peers/inputs/MODEL/rows.safetensors      calibration rows, int64 [rows, 512]
build/peers/inputs/MODEL/calibration.jsonl     the same documents as texts, for onecard's own command
build/peers/inputs/MODEL/choice.jsonl          for onecard's own verification; the judge alone reads the test set
build/peers/inputs/MODEL/canonical/            the source, unfused, one 2-D tensor a weight
build/peers/inputs/MODEL/inputs.json           names, sizes, digests
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from texts import DEMO, HELD_OUT

from onecard.calibration.packing import document_rows, pack_rows
from onecard.calibration.sources import read_jsonl
from onecard.calibration.tokens import Encoder
from onecard.checkpoint.source import open_folder
from onecard.core.rows import Row
from onecard.demo import corpus
from onecard.models.adapter import read
from onecard.models.families import load_adapter

ROW_TOKENS = 512
EVALUATION_ROWS = 100_000  # all of them
CALIBRATION_ROWS = 100_000  # as many as the texts fill
SEED = 0  # the recipe's calibration_seed: onecard packs the same rows from the same texts


def texts_of(which: str) -> Path:
    return (
        HELD_OUT
        if which == "test"
        else DEMO / "data" / f"{'calibration' if which == 'calibration' else 'evaluation'}.jsonl"
    )


def prepare(model: Path, folder: Path, calibration: Path | None = None) -> dict[str, Any]:
    """Write the inputs of `model`, unless they exist for exactly this model and these texts."""
    adapter, source = load_adapter(model), open_folder(model)
    sets = {
        "calibration": corpus.without_pictures(corpus.read_jsonl(texts_of("calibration"))),
        "choice": corpus.without_pictures(corpus.read_jsonl(texts_of("choice"))),
    }
    identity = hashlib.sha256((source.digest + json.dumps(sets, sort_keys=True)).encode()).hexdigest()
    facts = folder / "inputs.json"
    if facts.exists() and json.loads(facts.read_text())["identity"] == identity:
        return dict(json.loads(facts.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "canonical").mkdir(parents=True)
    for name, documents in sets.items():
        corpus.write_jsonl(folder / f"{name}.jsonl", documents)
    encoded = Encoder(model, adapter).encode_all(read_jsonl(folder / "calibration.jsonl"))
    rows = torch.stack([row.tokens for row in pack_rows(encoded, ROW_TOKENS, CALIBRATION_ROWS, SEED)])
    save_file({"rows": rows}, folder / "rows.safetensors")
    save_file(
        {name: read(adapter, source, name) for name in adapter.expected()}, folder / "canonical" / "model.safetensors"
    )
    linear = [f"{name}.weight" for block in range(adapter.n_blocks) for _, name, _, _ in adapter.modules(block)]
    found = {
        "identity": identity,
        "family": adapter.family,
        "rows": len(rows),
        "row_tokens": ROW_TOKENS,
        "parameters": sum(torch.Size(shape).numel() for shape in adapter.expected().values()),
        "source_bytes": source.file_bytes,
        "weights": linear,
        "experts": [name for name in linear if adapter.role(name) == "expert"],
    }
    facts.write_text(json.dumps(found, indent=1))
    return found


def evaluation_rows(model: Path, which: str, folder: Path) -> list[Row]:
    """One row a document, cut at ROW_TOKENS, of the choice set or of the test set (for the final run only)."""
    path = HELD_OUT if which == "test" else folder / "choice.jsonl"
    encoded = Encoder(model, load_adapter(model)).encode_all(read_jsonl(path))
    return document_rows(encoded, ROW_TOKENS, EVALUATION_ROWS)
