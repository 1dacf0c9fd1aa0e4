"""A run's files move from its work directory to OUT: everything but config.json, which comes after the verification.

A folder without config.json is no checkpoint to any engine, so a run that is killed in between leaves nothing that
loads.
"""

from pathlib import Path

from ..checkpoint import files
from ..checkpoint.emit import carry_side_files, clear_checkpoint
from ..checkpoint.formats.shard_formats import SHARD_FORMATS
from ..checkpoint.model import Model
from ..checkpoint.plan import Plan
from ..checkpoint.source import INDEX_NAME
from ..checkpoint.workdir import WorkDir
from ..core.file_names import RECORD_NAME
from ..core.layout import index_json
from ..core.rows import Step
from .exporters import FORMATS
from .run_output import finished_run


def move_to_out(
    model: Model, plan: Plan, format_name: str, workdir: WorkDir, out: Path, names: list[str], step: Step
) -> None:
    """`names`: all files that OUT will hold. A format of the work directory's own is moved; any other is written anew
    from the shards there."""
    if workdir.moving_to is None:
        clear_checkpoint(out)  # OUT holds one only when the run was begun with --overwrite for it
        files.make_folder(out)
        workdir.begin_move(out)
    # The list of files goes first: a later --overwrite may clear a folder that has it.
    files.write_json(out / RECORD_NAME, {"files": names})
    if format_name in SHARD_FORMATS:
        for shard in plan.shards:
            finished = workdir.path / "shards" / shard.file
            if finished.exists():
                files.move(finished, out / shard.file)
        files.write_json(out / INDEX_NAME, index_json(plan.shards))
    else:
        FORMATS[format_name].write(finished_run(model, plan, workdir.path / "shards"), out, step)
    carry_side_files(model.path, out)
