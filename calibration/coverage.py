"""The passes that count routes: the verb `calibration coverage`, and the balancing of a run's rows.

Both walk the unquantized model once. A run keeps its choice of rows in the work directory. The choice depends only on
what the run's identity holds, so a resumed run reads it and does not walk again.
"""

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..checkpoint import files
from ..checkpoint.activations import Activations
from ..checkpoint.checked import check_weights, checked_as_loaded
from ..checkpoint.model import open_source
from ..checkpoint.workdir import read_json
from ..core.device import choose_compute
from ..core.errors import InputError
from ..core.file_names import RECORD_NAME
from ..core.json_text import json_text
from ..core.rows import Row
from ..models.walk import Walk
from ..recipe import Recipe
from ..report.progress import Progress
from .balance import RowChoice, choose, draw
from .routes import Routes, blocks_with_experts, count_routes, counting_schedule
from .text_facts import row_facts
from .texts import RunTexts, prepare_texts


@dataclass(frozen=True)
class Coverage:
    """How many rows (tokens) each expert gets."""

    title: str
    blocks: list[int]
    counts: list[list[int]]  # by entry of `blocks`, then by expert
    enough: int  # an expert with fewer rows is starved
    facts: dict[str, Any]  # further entries of the JSON line

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        every = [count for layer in self.counts for count in layer]
        return {
            "title": self.title,
            **self.facts,
            "experts": len(every),
            "least_rows_of_an_expert": min(every),
            "experts_without_rows": sum(count == 0 for count in every),
            "experts_starved": sum(count < self.enough for count in every),
            "blocks": [{"block": b, "expert_rows": c} for b, c in zip(self.blocks, self.counts, strict=True)],
        }


def _strata(rows: list[Row], wanted: dict[int, int]) -> tuple[list[Hashable], dict[Hashable, int]]:
    """Each row's stratum, (length, whether it has images), and the wanted rows of each: the pool's own shares."""
    strata: list[Hashable] = [(len(row.tokens), row.pixels is not None) for row in rows]
    have, quotas = Counter(strata), dict[Hashable, int]()
    for length, count in wanted.items():
        pictured, plain = have[length, True], have[length, False]
        shown = min(pictured, round(count * pictured / max(1, pictured + plain)))
        quotas[length, True], quotas[length, False] = shown, min(plain, count - shown)
    return strata, quotas


def choice_of(texts: RunTexts, routes: Routes, recipe: Recipe) -> RowChoice:
    strata, quotas = _strata(texts.calibration, texts.wanted)
    enough = max(1, recipe.texts.warn_below_expert_rows)
    return choose(routes.counts_RLE, strata, quotas, recipe.texts.calibration_random_share, enough)


def _chosen(texts: RunTexts, rows: list[int], facts: dict[str, Any]) -> RunTexts:
    """The texts with only the chosen rows, and the choice in their facts."""
    kept = [texts.calibration[row] for row in rows]
    told = texts.facts["calibration"] | row_facts(kept) | {"balance": facts}
    return replace(texts, calibration=kept, facts=texts.facts | {"calibration": told}, wanted={})


def balanced(
    texts: RunTexts,
    walk: Walk,
    recipe: Recipe,
    work: Path,
) -> RunTexts:
    """The best rows of the pool, or the texts unchanged where there is no pool. The choice is kept in `work`."""
    if not texts.calibration or not texts.wanted or recipe.texts.calibration_pool == 1:
        return texts
    if not texts.is_pool or not blocks_with_experts(walk.adapter):
        told = "the texts fill no more rows than are wanted" if not texts.is_pool else "the model has no experts"
        return replace(texts, warnings=[*texts.warnings, f"calibration_pool has nothing to choose from: {told}"])
    path = work / "balance.json"
    if not path.exists():
        folder = work / "pool"
        shutil.rmtree(folder, ignore_errors=True)
        routes = _count(texts.calibration, walk, folder)
        choice = choice_of(texts, routes, recipe)
        drawn = draw(*_strata(texts.calibration, texts.wanted))
        facts = {
            "pool_rows": len(texts.calibration),
            "pool_rows_digest": texts.facts["calibration"]["rows_digest"],
            "chosen_digest": hashlib.sha256(json_text(choice.rows).encode()).hexdigest(),
            "worth": choice.worth,
            "worth_drawn": choice.worth_drawn,
            "least_rows_of_an_expert": int(routes.of(choice.rows).min()),
            "least_rows_drawn": int(routes.of(drawn).min()),
        }
        files.write_json(path, {"rows": choice.rows, "facts": facts})
    kept = read_json(path)
    return _chosen(texts, kept["rows"], kept["facts"])


def _count(rows: list[Row], walk: Walk, folder: Path) -> Routes:
    try:
        return count_routes(walk.hidden_rows(rows, Activations(folder, walk.device)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def coverage(
    model_name: str,
    recipe: Recipe,
    *,
    calibration: Path | None = None,
    evaluation: Path | None = None,
    device_name: str = "auto",
    console: Console | None = None,
    quiet: bool = False,
) -> Coverage:
    """The rows that a run of `recipe` would feed to every expert, balancing included. One pass; nothing is quantized.
    For the OUT of a finished run, the counts in its record. Raises InputError for a model without experts."""
    recorded = _recorded(Path(model_name))
    if recorded is not None:
        return recorded
    compute = choose_compute(device_name, recipe.compute_dtype, recipe.batch_tokens)
    model = open_source(model_name)
    if not blocks_with_experts(model.adapter):
        raise InputError(f"{model_name} has no experts: there is nothing to cover")
    texts = prepare_texts(model, recipe, calibration, evaluation, needs_calibration=True)
    with (
        tempfile.TemporaryDirectory(prefix="onecard-coverage-") as folder,
        Progress(f"onecard calibration coverage {model_name}", model.adapter.n_blocks, console, quiet) as progress,
        checked_as_loaded(compute, model),
    ):
        for warning in texts.warnings:
            progress.warn(warning)
        progress.expect(counting_schedule(model.adapter, texts.calibration))
        progress.begin("check weights")
        check_weights(model, compute)
        work = Path(folder)
        walk = Walk.over(model.adapter, model.source, compute, progress)
        routes = _count(texts.calibration, walk, work / "acts")
        facts: dict[str, Any] = {"model": model_name, "recipe": recipe.name, "pool_rows": len(texts.calibration)}
        rows = list(range(len(texts.calibration)))
        if texts.is_pool:
            choice = choice_of(texts, routes, recipe)
            drawn = routes.of(draw(*_strata(texts.calibration, texts.wanted)))
            rows = choice.rows
            facts |= {"worth": choice.worth, "worth_drawn": choice.worth_drawn, "least_rows_drawn": int(drawn.min())}
    kept = row_facts([texts.calibration[row] for row in rows])
    facts |= {key: kept[key] for key in ("rows", "tokens", "rows_digest", "rows_with_images", "long_rows")}
    title = f"{model_name}, {recipe.name}: {kept['rows']:,} rows, {kept['tokens']:,} tokens"
    return Coverage(title, routes.blocks, routes.of(rows).tolist(), recipe.texts.warn_below_expert_rows, facts)


def _recorded(folder: Path) -> Coverage | None:
    """The counts in a finished run's record, if `folder` is its OUT. Raises InputError if the run took none."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    record = read_json(path)
    blocks = [block for block in record.get("blocks", []) if block.get("expert_rows")]
    if not blocks:
        raise InputError(f"{path} holds no counts: that run took no statistics of experts. Name the original model")
    title = f"{folder}: the counts of its run"
    enough = record["recipe"].get("warn_below_expert_rows", 0)
    return Coverage(title, [b["block"] for b in blocks], [b["expert_rows"] for b in blocks], enough, {})
