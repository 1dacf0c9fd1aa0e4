"""A whole run from two short ones: every stage is a line in its number of batches, and blocks of a kind are alike.

Of a model's blocks a few are gone through. A block that is not counted costs what one of its kind did. What has no
block is counted once, or goes by the bytes of the source or of what is emitted.
"""

import math
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hollow import published, write_hollow
from onecard.checkpoint.assign import plan_for
from onecard.checkpoint.keeper import MOST_LOST_SECONDS
from onecard.checkpoint.model import open_source
from onecard.core.rows import spacing
from onecard.recipe import Recipe

from . import rates
from .job import ROW_TOKENS, WALK_BACK, WALK_FORWARD, WALK_STOPS, Gone, Size, go_through
from .ledger import WAITS, Key, Stage

EVALUATION_ROWS = 128
# Blocks that are gone through: the first, one of each kind, and the last.
BLOCKS = {"llama4-maverick": 4}
MOST_BLOCKS = 3
CHECK, BY_EMITTED = "check weights", ("move to OUT", "checksums")
# Batches of the two short runs.
SHORT = (2, 4)
# Stages of one block's own way.
BLOCK_STAGES = ("load", "tune", "statistics", "quantize", "propagate", "commit")


@dataclass
class Cost:
    """One stage of a whole run."""

    seconds: float = 0.0
    peak_bytes: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def total(self, what: str) -> float:
        return sum(amount for (kind, _), amount in self.counts.items() if kind == what)

    def add(self, other: "Cost", times: float) -> None:
        self.seconds += other.seconds * times
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        for key, amount in other.counts.items():
            self.counts[key] += amount * times  # type: ignore[assignment]


@dataclass(frozen=True)
class Whole:
    stages: dict[str, Cost]
    launches_per_block: float
    flags: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages.values())

    def brief(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 1),
            "launches_per_block": round(self.launches_per_block),
            "device_peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Asked:
    """A model, a method, tokens of calibration, and whether the kernels are there."""

    model: str
    recipe: Recipe
    tokens: int
    triton: bool = True
    disk: float = rates.DISK


def whole_run(asked: Asked) -> Whole:
    blocks = BLOCKS.get(asked.model, MOST_BLOCKS)
    rows = max(1, asked.recipe.batch_tokens // ROW_TOKENS)
    config = published(asked.model)
    of = math.ceil(asked.tokens / (rows * ROW_TOKENS))
    few, more = (go_through(config, asked.recipe, Size(blocks, n, of), asked.triton, asked.disk) for n in SHORT)
    wanted = (asked.tokens / (rows * ROW_TOKENS), EVALUATION_ROWS / rows)
    return _joined(asked, more, at_batches(few, more, wanted))


def at_batches(few: Gone, more: Gone, wanted: tuple[float, float]) -> dict[Key, Cost]:
    """Every stage at the wanted numbers of batches for calibration and evaluation: a line through two runs."""
    return {key: _line(key, few, more, wanted[key[0].startswith("verify")]) for key in more.stages}


def _line(key: Key, few: Gone, more: Gone, wanted: float) -> Cost:
    one, other = few.stages.get(key) or Stage(), more.stages[key]
    begin, end = few.size.batches, more.size.batches
    further = (wanted - end) / (end - begin)

    def at(first: float, second: float) -> float:
        return second + further * (second - first)

    counts: Counter[tuple[str, str]] = Counter()
    for each in one.counts.keys() | other.counts.keys():
        counts[each] = at(one.counts[each], other.counts[each])  # type: ignore[assignment]
        if each[0] == WAITS:  # what more batches hide can become nothing, and no less
            counts[each] = max(0.0, counts[each])  # type: ignore[assignment]
    busy, later = (stage.seconds - stage.total(WAITS) for stage in (one, other))
    waits = sum(amount for (what, _), amount in counts.items() if what == WAITS)
    return Cost(at(busy, later) + waits, round(at(one.peak_bytes, other.peak_bytes)), counts)


def _joined(asked: Asked, gone: Gone, lines: dict[Key, Cost]) -> Whole:
    with tempfile.TemporaryDirectory() as folder:
        model = open_source(str(write_hollow(Path(folder) / "model", published(asked.model))))
        plan = plan_for(model, asked.recipe)
        hidden = model.adapter.hidden_size
        source, emitted, n_blocks = plan.source_bytes, plan.emitted_bytes, model.adapter.n_blocks
        outside = sum(shard.data_bytes for shard in plan.pieces if shard.part == n_blocks)
        kinds = [gone.kinds[0] if block == 0 else _kind(model.adapter, block) for block in range(n_blocks)]
    stages: dict[str, Cost] = {}
    streams = 2 * asked.tokens * asked.recipe.quantizer.needs_statistics + 2 * EVALUATION_ROWS * ROW_TOKENS
    # A walk back keeps at its first stop the rows between its stretches and the gradient, and later the gradient.
    kept = 2 * _stretches(n_blocks) * asked.tokens * hidden * 2 / n_blocks
    lines = lines | _waits(lines, streams * hidden * 2, kept, asked.disk)
    for (name, block), cost in lines.items():
        if block is None or block >= gone.size.blocks:
            # Some stages read what lies outside the blocks, and some read the blocks as well.
            whole, part = (source, gone.source_bytes) if name == CHECK else (emitted, gone.emitted_bytes)
            of_blocks = max(0.0, cost.total("read") - outside) if name in (CHECK, *BY_EMITTED) else 0.0
            times = 1.0
            if name == WALK_STOPS:  # how long it waits for the disk is said by `_waits`
                cost = Cost(cost.seconds - cost.total(WAITS), cost.peak_bytes, cost.counts)
                times = _stretches(n_blocks) / _stretches(gone.size.blocks)
            if of_blocks:
                times += of_blocks / cost.total("read") * ((whole - outside) / (part - outside) - 1)
        else:
            times = _times(gone, kinds, block) * (_again(n_blocks) if WALK_FORWARD in name else 1.0)
        if times:
            stages.setdefault(name, Cost()).add(cost, times)
    typical = max(_typical(gone, kind) for kind in gone.kinds)
    a_block = sum(cost.total("launches") for (name, b), cost in lines.items() if b == typical and name in BLOCK_STAGES)
    flags: Counter[str] = Counter()
    for cost in stages.values():
        for (what, where), amount in cost.counts.items():
            if what.startswith("flag"):
                flags[f"{what.removeprefix('flag ')} at {where}"] += amount  # type: ignore[assignment]
    return Whole(stages, a_block, dict(flags))


def _phase(name: str) -> str | None:
    """Which stages of a block follow one another without another block between them."""
    if name in BLOCK_STAGES or name.startswith("verify"):
        return "files"
    return f"files, {name}" if name.startswith("walk") else None


def _waits(lines: dict[Key, Cost], rows_bytes: float, kept_bytes: float, disk_rate: float) -> dict[Key, Cost]:
    """How long the disk still works for a block when all else is done. What threads read and write is behind the
    computation, but no more than one block behind. `rows_bytes`: of the rows that enter a block. They are written every
    MOST_LOST_SECONDS (checkpoint/keeper.py). `kept_bytes`: what the walk back keeps, shared out among the blocks."""
    phases: dict[Key, list[Cost]] = {}
    for (name, block), cost in lines.items():
        phase = _phase(name)
        if phase is not None and block is not None:
            phases.setdefault((phase, block), []).append(cost)
    found: dict[Key, Cost] = {}
    for key, parts in phases.items():
        seconds = sum(cost.seconds for cost in parts)
        disk = sum(cost.total("disk seconds behind") + cost.total("disk seconds") for cost in parts)
        if key[0] == "files":
            disk += rows_bytes / disk_rate * seconds / MOST_LOST_SECONDS
        if key[0] == f"files, {WALK_BACK}":  # each block is read on the way back as on the way there
            there = phases.get((f"files, {WALK_FORWARD}", key[1]), [])
            disk = max(disk, sum(cost.total("disk seconds behind") for cost in there)) + kept_bytes / disk_rate
        late = disk - seconds
        if late > 0:
            found[key] = Cost(seconds=late)
    return found


def _kind(adapter: Any, block: int) -> str:
    sites = adapter.sites(block)
    return " ".join(sorted(f"{s.role}{s.out_features}{s.in_features}x{len(s.members)}" for s in sites))


def _typical(gone: Gone, kind: str) -> int:
    """The block that stands for its kind: neither the first nor the last, where there is one."""
    alike = [block for block, other in enumerate(gone.kinds) if other == kind]
    inner = [block for block in alike if block not in (0, len(gone.kinds) - 1)] or alike[:1]
    return inner[-1]


def _times(gone: Gone, kinds: list[str], block: int) -> float:
    """How many blocks of the whole model a counted block stands for."""
    last = len(gone.kinds) - 1
    if block == last:
        return 1.0
    kind = gone.kinds[block]
    if block != _typical(gone, kind):
        return 0.0
    return float(kinds.count(kind) - (gone.kinds[last] == kind))


def _stretches(n_blocks: int) -> int:
    return -(-n_blocks // spacing(n_blocks))


def _again(n_blocks: int) -> float:
    """The walk back computes the rows of most blocks twice (calibration/sensitivity.py)."""
    apart = spacing(n_blocks)
    last = (n_blocks - 1) // apart * apart
    return 1.0 + len(range(0, last, apart)) * (apart - 1) / n_blocks
