"""The record, `onecard.json`: every number of a run with its unit, and what the run was made of.

Terminal card, HTML page, model card and gate are drawn from it alone. Only its section `machine` (time, memory, the
machine's name) may differ between two runs of one recipe on one source. A section that was not asked for is an empty
object in the file and None here. Fields stand in the order of the file.

Most fields are optional: a record of round-to-nearest has no coverage, one of `flips` no KL, and the first schema
version lacks much. Readers handle None; a value that is there has its type.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .blocks import BlockFacts, ErrorSummary
from .flips import FlipSummary
from .kl import KlSummary
from .part import Many, Number, RecordPart
from .sizes import Allocation, FitSummary
from .verdict import Verdict

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)


class HubOrigin(RecordPart):
    """Where on the hub the original came from; both None for a local folder."""

    id: str | None = None
    revision: str | None = None


class ModelFacts(RecordPart):
    """The original. `card`: what the front matter of its README says of licence and languages. `config`: every field of
    its config.json that takes part in the forward pass."""

    name: str
    family: str | None = None
    blocks: int | None = None
    experts: int | None = None
    digest: str | None = None
    hub: HubOrigin = HubOrigin()
    card: dict[str, str | list[str]] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    # The matrices that are all zeros in the original (a pruned model's), by canonical name. None: not known.
    zero_matrices: Many[str] | None = None


class ConfigField(RecordPart):
    """A field of config.json in which the checkpoint differs from the original. `use`: 'followed' and 'fixed' are
    computed with, 'engines' by engines alone. `does`: what the field sets, in words."""

    field: str
    original: Any
    checkpoint: Any
    use: str
    does: str


class CheckpointFacts(RecordPart):
    """The measured files. A record of `quantize` names no folder and no digest: equal runs have equal records."""

    name: str | None = None
    digest: str | None = None
    bytes: int | None = None
    config_differences: Many[ConfigField] = ()
    # Evaluation texts, and options of items, that its own tokenizer and template encode otherwise; None: it has none.
    texts_encoded_otherwise: int | None = None


class WidthBytes(RecordPart):
    """The weights of one role that are stored at one width."""

    role: str
    width: str
    parameters: int
    bytes: int


class PlanSummary(RecordPart):
    """Sizes of the files. `emitted_bytes`: the shards with their headers."""

    emitted_bytes: int
    weight_bytes: int | None = None
    index_bytes: int | None = None
    source_bytes: int | None = None
    parameters: int | None = None
    quantized_parameters: int | None = None
    quantized_share: float | None = None
    bits_per_weight: float | None = None
    quantized_bits_per_weight: float | None = None
    shards: int | None = None
    widths: Many[WidthBytes] = ()


class SourceFacts(RecordPart):
    """One source of a mixture of texts. `left_out`: rows that could not be used. `read` and `passed_over`: files of a
    folder."""

    source: str
    kind: str | None = None
    weight: float | None = None
    documents: int | None = None
    left_out: int | None = None
    tokens_given: int | None = None
    digest: str | None = None
    read: Many[str] = ()
    passed_over: Many[str] = ()


class TextFacts(RecordPart):
    """Calibration or evaluation texts. `digest` is of the documents, `rows_digest` of the token rows; `repeated` counts
    documents that are the same tokens as another."""

    source: str | None = None
    digest: str | None = None
    documents: int | None = None
    repeated: int | None = None
    tokens_given: int | None = None
    sources: Many[SourceFacts] = ()
    rows: int | None = None
    tokens: int | None = None
    rows_digest: str | None = None
    rows_with_images: int | None = None
    tokens_by_kind: dict[str, int] = Field(default_factory=dict)
    tokens_by_source: dict[str, int] = Field(default_factory=dict)
    longest_row_tokens: int | None = None
    long_rows: int | None = None


class ExportFacts(RecordPart):
    """The format that the files have, if not the house's own. `matrices`: how many are stored at which width."""

    format: str
    onecard: str | None = None
    # Name, digest and format of the checkpoint that `onecard export` read; unset where a recipe named the format.
    made_from: dict[str, str] | None = Field(default=None, alias="from")
    matrices: dict[str, int] = Field(default_factory=dict)
    # Whether the record's KL was measured on these files; unset, it is that of the files they were made from.
    measured: bool | None = None


class Machine(RecordPart):
    """Time, memory and the machine's name."""

    platform: str | None = None
    processor: str | None = None
    cores: int | None = None
    threads: int | None = None
    device: str | None = None
    seconds: Number | None = None
    stage_seconds: dict[str, Number] = Field(default_factory=dict)
    peak_rss_bytes: int | None = None
    peak_device_bytes: int | None = None


class Record(BaseModel):
    """Filled while a run goes on."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    command: str
    onecard: str
    model: ModelFacts
    # The recipe as its file has it, with its digest; empty for `verify` and `flips`.
    recipe: dict[str, Any] = Field(default_factory=dict)
    # By "calibration" and "evaluation".
    texts: dict[str, TextFacts] = Field(default_factory=dict)
    # The date that the chat template was told, YYYY-MM-DD. None, and not in the file, where it asks for none.
    template_date: str | None = None
    plan: PlanSummary | None = None
    fit: FitSummary | None = None
    allocation: Allocation | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    # All that the emitted bytes depend on.
    identity: dict[str, str] = Field(default_factory=dict)
    # The names of all files that the run put into OUT.
    files: list[str] = []
    blocks: list[BlockFacts] = []
    fallbacks: dict[str, int] = Field(default_factory=dict)
    warnings: list[str] = []
    checkpoint: CheckpointFacts | None = None
    # The dtype that `kl`, `errors` and `flips` were computed in; unset in records of an older onecard.
    compute_dtype: str | None = None
    kl: KlSummary | None = None
    errors: ErrorSummary | None = None
    flips: FlipSummary | None = None
    gate: Verdict | None = None
    # Set for files in another format than the house's own; `kl` and the like may then be of their parent.
    export: ExportFacts | None = None
    machine: Machine = Machine()
    schema_version: int = SCHEMA_VERSION

    @model_validator(mode="before")
    @classmethod
    def _absent_if_empty(cls, data: Any) -> Any:
        """A section that is missing, null or {}: all three say that it was not asked for."""
        if not isinstance(data, dict):
            return data
        return data | {key: None for key in SECTIONS if data.get(key) == {}}

    @property
    def measured_dtype(self) -> str | None:
        """The dtype that the figures were computed in. An older record of a run says it in its identity; None where
        nothing does."""
        return self.compute_dtype or self.identity.get("compute dtype")

    def called(self, name: str) -> "Record":
        """The record with a name for its checkpoint, where it has none and there is a checkpoint."""
        if self.checkpoint is None or self.checkpoint.name is not None:
            return self
        return self.model_copy(update={"checkpoint": self.checkpoint.model_copy(update={"name": name})})

    def to_json(self) -> dict[str, Any]:
        """As the file holds it: every section, empty where nothing was asked for. Of newer keys none that holds nothing
        is written, as in older records."""
        return {name: _plain(value) for name, value in self if name not in NOT_ALWAYS or value is not None}


# Left out of the file where they are None.
NOT_ALWAYS = ("compute_dtype", "template_date")
# What a record holds None for where the file has an empty object.
SECTIONS = ("checkpoint", "plan", "kl", "errors", "flips", "gate", "fit", "allocation", "export")


def _plain(value: Any) -> Any:
    if value is None:
        return {}
    if isinstance(value, RecordPart):
        return value.to_json()
    if isinstance(value, dict):
        return {key: entry.to_json() if isinstance(entry, RecordPart) else entry for key, entry in value.items()}
    if isinstance(value, list):
        return [entry.to_json() if isinstance(entry, RecordPart) else entry for entry in value]
    return value
