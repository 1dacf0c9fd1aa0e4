"""`onecard export`: write a checkpoint anew in another format from its own integer codes.

Everything that can be refused is refused before a byte is written. The order on disk is that of a run: first the
record, which names all files to come, so that `--overwrite` knows what is ours; then weights and side files; then the
final record and SHA256SUMS; last config.json. A folder that was stopped half-way has no config.json, and no tool loads
it.

The new record is the parent's with the figures of the new files, and a section `export` that names what they were made
from. A KL in it was measured on the parent's files; `onecard verify` measures the new ones.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint import files
from ..checkpoint.checksums import write_sums
from ..checkpoint.emit import clear_checkpoint, emission_warnings, written_files
from ..checkpoint.model import Model, open_model, open_written, said_name
from ..checkpoint.packed import PackedSource
from ..checkpoint.paths import check_paths, check_space
from ..checkpoint.side_files import carry_side_files, refuse_adapter
from ..checkpoint.stored_widths import stored_facts
from ..core.errors import InputError
from ..core.file_names import RECORD_NAME
from ..core.layout import json_bytes
from ..core.record.reading import read_record
from ..core.record.schema import CheckpointFacts, ExportFacts, ModelFacts, PlanSummary, Record
from ..core.rows import Step
from ..core.schedule import Expected, Schedule
from ..models.config_keys import differences_from
from ..report.resources import package_versions, peak_rss_bytes
from .exporters import FORMATS, Exporter, Files, exporter_of, refuse_unheld
from .run_output import weight_bytes

# Taking the digest of a byte takes about this share of the time of converting and writing it.
DIGEST_SHARE = 0.2


@dataclass(frozen=True)
class Exported:
    """What was written, or would be written without `dry_run`."""

    checkpoint: str
    format: str
    out: str
    # Every file of weights, and its bytes.
    planned: Files
    dry_run: bool
    warnings: list[str]
    seconds: float

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        return {
            "checkpoint": self.checkpoint,
            "format": self.format,
            "out": self.out,
            "dry_run": self.dry_run,
            "files": dict(self.planned),
            "bytes": sum(count for _, count in self.planned),
            "weight_bytes": weight_bytes(self.planned),
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }


def export(
    checkpoint: str,
    format_name: str,
    out: Path,
    step: Step,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    without_adapter: bool = False,
) -> Exported:
    """Write `checkpoint` into the folder `out` in a format of FORMATS. `without_adapter`: although an adapter lies
    beside its weights.

    Raises InputError before anything is written, and ResourceError when disk or memory run out.
    """
    began = time.monotonic()
    exporter = exporter_of(format_name)
    model = open_model(checkpoint)
    refuse_adapter(model.path, without_adapter)
    refuse_unheld(model, format_name)
    planned = exporter.plan(model)
    check_paths(out, None, model.path, False, overwrite)
    parent = _record_of(model)
    warnings = _warnings(model, parent, exporter)
    if not dry_run:
        check_space(out, sum(count for _, count in planned))
        names = written_files([name for name, _ in planned], model.path)
        record = parent.model_copy(update={"files": names, "warnings": [*parent.warnings, *warnings]})
        _write(model, record, format_name, out, planned, step)
    return Exported(checkpoint, format_name, str(out), planned, dry_run, warnings, time.monotonic() - began)


def _warnings(model: Model, parent: Record, exporter: Exporter) -> list[str]:
    changed = differences_from(parent.model.config, model.adapter.config)
    told = [
        f"config.json of {said_name(model.name)}, against its record: {difference.told()}" for difference in changed
    ]
    return exporter.warnings(model) + emission_warnings(model.path, model.folder.shards) + told


def _schedule(planned: Files) -> Schedule:
    """Files to write and to take the digests of, by their bytes."""
    stages = [Expected(f"write {name}", "write", float(count), (f"write {name}",)) for name, count in planned]
    digests = DIGEST_SHARE * weight_bytes(planned)
    return Schedule((*stages, Expected("checksums", "checksums", digests, ("checksums",))), in_seconds=False)


def _write(model: Model, parent: Record, format_name: str, out: Path, planned: Files, step: Step) -> None:
    """`parent`: the model's record, with the files to write and the warnings of this export."""
    exporter, names = FORMATS[format_name], parent.files
    clear_checkpoint(out)
    files.make_folder(out)
    files.write_json(out / RECORD_NAME, {"files": names})
    step.expect(_schedule(planned))
    try:
        exporter.write(model, out, step)
        carry_side_files(model.path, out)
    except InputError:
        clear_checkpoint(out)  # only reading a weight showed that the format cannot hold it
        raise
    wrong = {name: (out / name).stat().st_size for name, count in planned if (out / name).stat().st_size != count}
    assert not wrong, (wrong, planned)
    config = exporter.config(model)
    record = exported_record(parent, model, open_written(model, out, config), format_name)
    files.write_json(out / RECORD_NAME, record.to_json())
    step.begin("checksums")
    config_bytes = json_bytes(config)
    write_sums(out, names, {"config.json": config_bytes})
    files.write_bytes(out / "config.json", config_bytes)


def exported_record(parent: Record, model: Model, written: Model, format_name: str) -> Record:
    """The record of `written`, which was made from `model`, whose own record is `parent`."""
    facts = stored_facts(written)
    old_plan = {} if parent.plan is None else parent.plan.to_json()
    return parent.model_copy(
        update={
            "plan": PlanSummary(**{"source_bytes": model.folder.file_bytes} | old_plan | facts),
            "checkpoint": CheckpointFacts(bytes=facts["emitted_bytes"]),
            # A resumed run compares identities. No run of quantize made these bytes, so none may take them for its own.
            "identity": parent.identity | {"exported to": format_name},
            "export": ExportFacts.model_validate(
                {
                    "format": format_name,
                    "onecard": __version__,
                    "from": {"name": said_name(model.name), "digest": model.folder.digest, "format": label(model)},
                    "matrices": matrices(written),
                }
            ),
        }
    )


def matrices(model: Model) -> dict[str, int]:
    """Width -> number of matrices stored at it; `onecard check` compares a folder with these."""
    return dict(sorted(Counter(weight.width for weight in model.packed.values()).items()))


def _record_of(model: Model) -> Record:
    """The record beside a checkpoint's weights, or a new one if there is none."""
    try:
        return read_record(model.path / RECORD_NAME)
    except InputError:
        facts = ModelFacts(**model.facts())
        return Record(command="export", onecard=__version__, model=facts, versions=package_versions())


def label(model: Model) -> str:
    """A checkpoint's format in words."""
    return model.source.label if isinstance(model.source, PackedSource) else "dense"
