"""A record as it lies in a file -> typed values, checked once, for what is drawn from it.

Nearly everything is optional: a record of round-to-nearest has no coverage, one of `flips` no KL. What is there must
have its shape, so that whoever draws meets no surprise; a file that is no record is refused in one message that lists
every fault. Unknown keys are left alone: a record may say more than this reads.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from ..core.errors import InputError, input_error
from ..core.file_names import RECORD_NAME
from .reading_sizes import PART, Allocation, Fit

READABLE_VERSIONS = (1, 2)
WAY_OUT = (
    f"Name the {RECORD_NAME} of a finished checkpoint, its folder, or a file that `onecard verify --record` or "
    "`onecard flips --record` wrote."
)
MOST_FAULTS = 12


class _Part(BaseModel):
    model_config = PART


class Model(_Part):
    name: str
    family: str | None = None
    blocks: int | None = None
    experts: int | None = None
    digest: str | None = None


class Checkpoint(_Part):
    name: str | None = None
    digest: str | None = None
    bytes: int | None = None


class Width(_Part):
    role: str
    width: str
    parameters: int
    bytes: int


class Plan(_Part):
    emitted_bytes: int
    source_bytes: int | None = None
    bits_per_weight: float | None = None
    quantized_bits_per_weight: float | None = None
    quantized_share: float | None = None
    widths: tuple[Width, ...] = ()


class Block(_Part):
    block: int
    expert_rows: tuple[int, ...] = ()
    damping_raised: int = 0
    diagonal_fallbacks: int = 0


class Bucket(_Part):
    label: str
    tokens: int
    documents: int | None = None
    kl_mean_nats: float
    kl_low_nats: float | None = None
    kl_high_nats: float | None = None
    same_top1: float | None = None


class Histogram(_Part):
    edges_nats: tuple[float, ...]
    tokens: tuple[int, ...]

    @model_validator(mode="after")
    def _sound(self) -> "Histogram":
        edges = self.edges_nats
        if len(edges) != len(self.tokens) + 1 or len(edges) < 3:
            raise ValueError("there must be one edge more than bins, and two bins at least")
        if edges[0] < 0 or edges[1] <= 0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError("edges_nats must rise from 0")
        return self


class Document(_Part):
    document: int | str
    digest: str | None = None
    kind: str | None = None
    source: str | None = None
    tokens: int
    kl_mean_nats: float
    same_top1: float | None = None
    nll_reference: float | None = None
    nll_quantized: float | None = None


class WorstToken(_Part):
    document: int | str
    kind: str | None = None
    position: int
    kl_nats: float
    before: str = ""
    token: str
    after: str = ""
    p_reference: float | None = None
    p_quantized: float | None = None
    reference_top: tuple[tuple[str, float], ...] = ()
    quantized_top: tuple[tuple[str, float], ...] = ()


class Interval(_Part):
    method: str
    level: float
    resamples: int | None = None
    seed: int | None = None


class Kl(_Part):
    tokens: int
    documents: int
    kl_mean_nats: float
    kl_low_nats: float | None = None
    kl_high_nats: float | None = None
    kl_median_nats: float | None = None
    kl_p90_nats: float | None = None
    kl_p95_nats: float | None = None
    kl_p99_nats: float | None = None
    kl_p999_nats: float | None = None
    kl_max_nats: float | None = None
    reverse_kl_mean_nats: float | None = None
    same_top1: float | None = None
    same_top1_low: float | None = None
    same_top1_high: float | None = None
    top5_overlap: float | None = None
    delta_p_mean: float | None = None
    delta_p_rms: float | None = None
    delta_p_quantiles: dict[str, float] = {}
    perplexity_reference: float | None = None
    perplexity_quantized: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_low: float | None = None
    perplexity_ratio_high: float | None = None
    interval: Interval | None = None
    changed_routes: float | None = None
    changed_routes_by_block: dict[str, float] = {}
    histogram: Histogram | None = None
    by_position: tuple[Bucket, ...] = ()
    by_confidence: tuple[Bucket, ...] = ()
    by_kind: tuple[Bucket, ...] = ()
    by_document: tuple[Document, ...] = ()
    worst_tokens: tuple[WorstToken, ...] = ()


class BlockError(_Part):
    block: int
    hidden: float | None = None
    attention: float | None = None
    feed_forward: float | None = None
    units: dict[str, float | None] = {}


class ExpertError(_Part):
    block: int
    expert: int
    weight_error: float | None = None
    output_error: float | None = None
    weight_gain: float | None = None
    rows: int | None = None
    calibration_rows: int | None = None
    score: float | None = None


class Errors(_Part):
    blocks: tuple[BlockError, ...] = ()
    experts: tuple[ExpertError, ...] = ()
    worst_experts: tuple[ExpertError, ...] = ()


class Share(_Part):
    share: float
    low: float | None = None
    high: float | None = None
    count: int


class Answer(_Part):
    id: str | int
    right: int | None = None
    reference: int
    quantized: int
    margin_reference: float | None = None
    margin_quantized: float | None = None


class Task(_Part):
    task: str
    items: int
    shots: int | None = None
    digest: str | None = None
    accuracy_reference: Share
    accuracy_quantized: Share
    changed: Share
    right_to_wrong: Share
    wrong_to_right: Share
    mcnemar_p: float | None = None
    margin_of_changed: float | None = None
    margin_of_all: float | None = None
    answers: tuple[Answer, ...] = ()


class Flips(_Part):
    all: Task
    tasks: tuple[Task, ...] = ()


class Check(_Part):
    name: str
    passed: bool
    kind: str | None = None
    said: str = ""
    measured: float | None = None
    allowed: float | None = None
    low: float | None = None
    high: float | None = None


class Gate(_Part):
    passed: bool
    baseline: str | None = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


class Export(_Part):
    format: str
    matrices: dict[str, int] = {}
    # What it was made from by `onecard export`; None where a run's own recipe named the format.
    made_from: dict[str, Any] | None = Field(default=None, alias="from")


class Record(_Part):
    """A RunRecord (report/record.py) as it is read back."""

    command: str
    onecard: str
    schema_version: int
    model: Model
    checkpoint: Checkpoint | None = None
    recipe: dict[str, Any] = {}
    texts: dict[str, dict[str, Any]] = {}
    plan: Plan | None = None
    versions: dict[str, str] = {}
    identity: dict[str, Any] = {}
    files: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    fallbacks: dict[str, int] = {}
    warnings: tuple[str, ...] = ()
    kl: Kl | None = None
    errors: Errors | None = None
    flips: Flips | None = None
    gate: Gate | None = None
    fit: Fit | None = None
    allocation: Allocation | None = None
    export: Export | None = None
    machine: dict[str, Any] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _absent_if_empty(cls, data: Any) -> Any:
        """A section that is missing, null or {}: all three say that it was not made."""
        if not isinstance(data, dict):
            return data
        sections = ("checkpoint", "plan", "kl", "errors", "flips", "gate", "fit", "allocation", "export")
        return data | {key: None for key in sections if data.get(key) == {}}


def read_run(path: Path) -> Record:
    """The record in the file `path`, or in the folder `path` of a checkpoint. Raises InputError."""
    file = path / RECORD_NAME if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"there is no record at {path}" + (f": it holds no {RECORD_NAME}" if path.is_dir() else "") + f". {WAY_OUT}"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_json)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is no record: it cannot be read as JSON ({error}). {WAY_OUT}") from None
    if path.is_dir() and isinstance(data, dict) and isinstance(data.get("checkpoint"), dict):
        # A record of quantize names no folder, so that equal runs have equal records.
        data["checkpoint"] = {"name": path.resolve().name} | data["checkpoint"]
    return check_record(data, str(file))


def check_record(data: Any, name: str) -> Record:
    """The record that `data`, parsed JSON, is; `name` is what messages call it. Raises InputError."""
    if not isinstance(data, dict) or "schema_version" not in data:
        raise InputError(f"{name} is no record of onecard: it has no schema_version. {WAY_OUT}")
    version = data["schema_version"]
    if version not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise InputError(
            f"{name} has schema version {version!r}, and this onecard reads {known}: use the onecard that wrote it "
            f"({data.get('onecard', 'its version is not said')}), or a newer one"
        )
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in found]
        more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise input_error(f"{name} is no sound record:", faults[:MOST_FAULTS] + more, WAY_OUT) from None


def _no_json(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
