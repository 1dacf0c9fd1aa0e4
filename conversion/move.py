"""A run's files move from its work directory to OUT: everything but config.json, which comes after the verification.

A folder without config.json is no checkpoint to any engine, so a run that is killed in between leaves nothing that
loads.
"""

from pathlib import Path

from ..checkpoint import files
from ..checkpoint.emit import clear_checkpoint, join_shards
from ..checkpoint.formats.shard_formats import SHARD_FORMATS
from ..checkpoint.model import Model
from ..checkpoint.plan import Plan, index_files
from ..checkpoint.side_files import carry_side_files
from ..checkpoint.workdir import WorkDir
from ..core.file_names import RECORD_NAME
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
        _move_shards(plan, workdir.path / "shards", out)
    else:
        FORMATS[format_name].write(finished_run(model, plan, workdir.path / "shards"), out, step)
    carry_side_files(model.path, out)


def _move_shards(plan: Plan, finished: Path, out: Path) -> None:
    """Move the pieces from the folder `finished` to OUT, or join them there into one file.

    Joined pieces stay in the work directory until the run is over, so that a run that was killed can join them anew.
    """
    if plan.shards == plan.pieces:
        for shard in plan.shards:
            if (finished / shard.file).exists():
                files.move(finished / shard.file, out / shard.file)
    else:
        (whole,) = plan.shards
        join_shards([finished / piece.file for piece in plan.pieces], whole.tensors, out / whole.file)
    for name, content in index_files(plan.shards).items():
        files.write_bytes(out / name, content)
