"""The one story: plan, calibrate, quantize, emit, verify. The only file, with prepare.py, that sees every room.

A run is a row of stages; after each one the work directory is committed, so a killed run goes on where it was:

    0 embed     token rows -> hidden rows that enter block 0, for both streams
    1..n        one block: statistics, codes, packed shards, hidden rows that enter the next block
    n+1 rest    what lies outside the blocks is copied
    n+2 move    shards, index and side files move to OUT
    n+3 verify  the twin walk over source and emitted files; then the record and, last of all, config.json
"""

import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import __version__
from .checkpoint import files
from .checkpoint.emit import ShardWriter, carry_side_files, index_json
from .checkpoint.formats import compressed_tensors as ct
from .checkpoint.packed import open_packed
from .checkpoint.source import Folder, nonfinite, open_folder
from .checkpoint.workdir import Activations, WorkDir
from .core.errors import InputError, LimitError, input_error
from .core.rows import batches
from .eval.summary import summarize
from .eval.twin import Side, twin_walk
from .models.adapter import Adapter, Role
from .models.walk import Calls, Embedder
from .planner.cost import Cost, estimate, measure_flops
from .planner.plan import Plan
from .prepare import (
    Model,
    RunTexts,
    check_out,
    check_space,
    choose_device,
    choose_dtype,
    open_model,
    open_source,
    plan_for,
    prepare_texts,
)
from .quantize.site import Method
from .recipe import Recipe
from .report.progress import Progress
from .report.record import FILE_NAME, RunRecord
from .report.resources import describe_machine, package_versions, peak_device_bytes, peak_rss_bytes
from .stages import BlockJob, quantize_block

RECORD = "record.json"


def method_of(recipe: Recipe) -> Method:
    return Method(recipe.method, recipe.scale_search, recipe.damping, recipe.activation_order)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What the record says of a plan."""
    return {
        "emitted_bytes": plan.emitted_bytes,
        "source_bytes": plan.source_bytes,
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized_parameters,
        "quantized_share": plan.quantized_parameters / plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "quantized_bits_per_weight": plan.quantized_bits_per_weight,
        "shards": len(plan.shards),
    }


def _identity(
    model: Model, recipe: Recipe, texts: RunTexts, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """All that the bytes of a run depend on. A resumed run must find every one of them again."""
    identity = {
        "onecard": __version__,
        "recipe": f"{recipe.name} {recipe.digest[:16]}",
        "source": model.folder.digest,
        "device": device.type,
        "compute dtype": str(dtype).removeprefix("torch."),
        # Sums over another number of threads round differently.
        "threads": str(torch.get_num_threads()),
    }
    identity |= {f"{which} texts": str(facts["digest"]) for which, facts in texts.facts.items()}
    return identity | {f"version of {name}": v for name, v in package_versions().items() if name != "datasets"}


def quantize(
    model_name: str,
    out: Path,
    recipe: Recipe,
    *,
    device_name: str = "auto",
    work: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    calibration: Path | None = None,
    evaluation: Path | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> RunRecord:
    """Run the whole job; returns its record, which lies in OUT as onecard.json too."""
    began = time.monotonic()
    device = choose_device(device_name)
    dtype = choose_dtype(recipe, device)
    method = method_of(recipe)
    model = open_source(model_name)
    plan = plan_for(model, recipe)
    work_path = work if work is not None else out.with_name(out.name + ".work")
    check_out(out, model.path, resume, overwrite)
    if work_path.resolve() == out.resolve():
        raise InputError(f"--work and OUT are both {out}: name two folders")
    texts = prepare_texts(model, recipe, calibration, evaluation, method.needs_statistics)
    identity = _identity(model, recipe, texts, device, dtype)
    if resume and not work_path.exists() and (out / "config.json").exists() and (out / FILE_NAME).exists():
        return _finished(out, recipe, model)
    cost = estimate(
        model.adapter, plan, method.needs_statistics, _tokens(texts.calibration), _tokens(texts.evaluation),
        dtype.itemsize, 1.0, device, site_budget(device),
    )  # fmt: skip
    if not resume:
        check_space(work_path, cost.disk_bytes)
    record = RunRecord(
        command="quantize",
        onecard=__version__,
        model=model.facts(),
        recipe=recipe.model_dump(mode="json") | {"digest": recipe.digest},
        texts=texts.facts,
        plan=plan_facts(plan),
        versions=package_versions(),
        warnings=model.adapter.faults(model.config),
    )
    with (
        WorkDir(work_path, identity, resume, overwrite) as workdir,
        Progress(f"onecard quantize {model_name}", model.adapter.n_blocks, console, quiet) as progress,
    ):
        if workdir.done == 0:
            _scan(model, workdir, progress)
        record = _stages(
            model, plan, recipe, method, texts, out, overwrite, device, dtype, workdir, progress, record, began
        )
        workdir.close(remove=True)
    return record


def _tokens(rows: list[Any]) -> int:
    return sum(len(row.tokens) for row in rows)


def site_budget(device: torch.device) -> int:
    """Working memory for one cut of a site: 1 GB of RAM, or an eighth of the card."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 8
    return 1_000_000_000


def _finished(out: Path, recipe: Recipe, model: Model) -> RunRecord:
    """OUT is finished and its work directory is gone: there is nothing to resume."""
    record = RunRecord(**json.loads((out / FILE_NAME).read_text(encoding="utf-8")))
    if record.recipe.get("digest") != recipe.digest or record.model["digest"] != model.folder.digest:
        raise InputError(f"{out} is a finished run of another recipe or source: replace it with --overwrite")
    return record


def _scan(model: Model, workdir: WorkDir, progress: Progress) -> None:
    """Every weight is read once before anything is written: NaN or Inf would pass through silently otherwise."""
    progress.begin("check weights")
    problems = []
    for name in model.folder.names:
        found = nonfinite(model.folder, name)
        if found:
            problems.append(f"{name} holds {found}")
    if problems:
        workdir.close(remove=True)
        raise input_error(
            f"{model.name} holds values that are no numbers:", problems, "The checkpoint is damaged: fetch it again."
        )


def _stages(
    model: Model,
    plan: Plan,
    recipe: Recipe,
    method: Method,
    texts: RunTexts,
    out: Path,
    overwrite: bool,
    device: torch.device,
    dtype: torch.dtype,
    workdir: WorkDir,
    progress: Progress,
    record: RunRecord,
    began: float,
) -> RunRecord:
    adapter, blocks = model.adapter, model.adapter.n_blocks
    store = Activations(workdir.path / "acts")
    groups = batches(texts.calibration, recipe.batch_tokens)
    if workdir.done < 1:
        if method.needs_statistics:
            progress.begin("embed")
            embedder = Embedder(adapter, model.source, texts.calibration, device, dtype)
            for k, numbers in enumerate(groups):
                hidden = embedder.batch(numbers)
                store.put(0, "reference", k, hidden)
                store.put(0, "quantized", k, hidden)
            del embedder
        workdir.commit(1)
    calls = Calls(adapter, device, dtype)
    for index in range(blocks):
        file = workdir.folder("blocks") / f"{index:04d}.json"
        if workdir.done < 2 + index:
            job = BlockJob(
                adapter, model.source, plan, recipe, method, index, groups, store, calls, device, dtype,
                site_budget(device), workdir.folder("shards"),
            )  # fmt: skip
            facts = quantize_block(job, progress)
            files.write_json(file, facts)
            workdir.commit(2 + index)
            store.drop(index)
        record.blocks.append(json.loads(file.read_text(encoding="utf-8")))
        _check_limits(record, recipe)
    _summarise_coverage(record, recipe)
    if workdir.done < 2 + blocks:
        progress.begin("copy the rest")
        writer = ShardWriter([s for s in plan.shards if s.stage == blocks], workdir.folder("shards"))
        for name in writer.names():
            writer.put(name, model.source.get(name))
        workdir.commit(2 + blocks)
    if workdir.done < 3 + blocks:
        progress.begin("move to OUT")
        if overwrite and out.is_dir():
            _clear_out(out)
        out.mkdir(parents=True, exist_ok=True)
        for shard in plan.shards:
            finished = workdir.path / "shards" / shard.file
            if finished.exists():
                files.move(finished, out / shard.file)
        files.write_json(out / "model.safetensors.index.json", index_json(plan.shards))
        carry_side_files(model.path, out)
        workdir.commit(3 + blocks)
    config = model.config | {"quantization_config": _quantization_config(adapter, plan)}
    if workdir.done < 4 + blocks:
        emitted = open_folder(out)
        assert emitted.file_bytes == plan.emitted_bytes, (emitted.file_bytes, plan.emitted_bytes)
        record.kl = _compare(model, Side("quantized", adapter, open_packed(emitted, config["quantization_config"])),
                             texts, recipe.batch_tokens, workdir.folder("verify"), device, dtype, progress)  # fmt: skip
        _close_machine(record, progress, device, began)
        files.write_json(workdir.path / RECORD, record.to_json())
        workdir.commit(4 + blocks)
    else:
        record = RunRecord(**json.loads((workdir.path / RECORD).read_text(encoding="utf-8")))
    files.write_json(out / FILE_NAME, record.to_json())
    files.write_json(out / "config.json", config)
    return record


def _check_limits(record: RunRecord, recipe: Recipe) -> None:
    """Limits that a block can pass: the run stops there, and what is finished is kept."""
    block = record.blocks[-1]
    rows = block.get("expert_rows") or []
    starved = [f"expert {e} got {n} rows" for e, n in enumerate(rows) if n < recipe.fail_below_expert_rows]
    if starved:
        raise LimitError(
            f"block {block['block']}: {', '.join(starved[:8])}, and the recipe fails below "
            f"{recipe.fail_below_expert_rows}: give more or more varied calibration texts"
        )
    fallbacks = sum(b["diagonal_fallbacks"] for b in record.blocks)
    if fallbacks > recipe.max_fallbacks:
        raise LimitError(
            f"{fallbacks} matrices had second moments that could not be factored, and the recipe allows "
            f"{recipe.max_fallbacks}: raise damping or shrinkage, or give more calibration texts"
        )


def _summarise_coverage(record: RunRecord, recipe: Recipe) -> None:
    """Count what fell back, and warn where experts saw little."""
    covered = [n for block in record.blocks for n in block.get("expert_rows") or []]
    if not covered:
        return
    low = [n for n in covered if n < recipe.warn_below_expert_rows]
    record.fallbacks = {
        "experts_in_all": len(covered),
        "least_rows_of_an_expert": min(covered),
        "experts_without_rows": sum(n == 0 for n in covered),
        f"experts_below_{recipe.warn_below_expert_rows}_rows": len(low),
        "damping_raised": sum(b["damping_raised"] for b in record.blocks),
        "diagonal_fallbacks": sum(b["diagonal_fallbacks"] for b in record.blocks),
    }
    if low:
        record.warnings.append(
            f"{len(low)} of {len(covered)} experts got fewer than {recipe.warn_below_expert_rows} calibration rows and "
            "borrowed from their layers: give more or more varied calibration texts"
        )


def _quantization_config(adapter: Adapter, plan: Plan) -> dict[str, Any]:
    """Every 2-D weight that stays as it was is named in `ignore`; the format's own package builds the block."""
    keep = (Role.EMBEDDING, Role.NORM)
    ignore = [
        name.removesuffix(".weight")
        for name, shape in adapter.expected().items()
        if len(shape) == 2 and name.endswith(".weight") and adapter.role(name) not in keep
        and name.removesuffix(".weight") not in plan.schemes
    ]  # fmt: skip
    if adapter.tied_head:
        ignore.append("lm_head")
    return ct.quantization_config(next(iter(plan.schemes.values())), sorted(ignore))


def _clear_out(out: Path) -> None:
    """--overwrite: the old config goes first, so that a half-cleared folder cannot be loaded; folders are left."""
    (out / "config.json").unlink(missing_ok=True)
    for item in out.iterdir():
        if item.is_file() or item.is_symlink():
            item.unlink()


def _compare(
    model: Model,
    quantized: Side,
    texts: RunTexts,
    batch_tokens: int,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, Any]:
    reference = Side("reference", model.adapter, model.source)
    shutil.rmtree(folder, ignore_errors=True)
    results = twin_walk(
        reference, quantized, texts.evaluation, batch_tokens, Activations(folder), device, dtype, progress
    )
    return asdict(summarize(results))


def _close_machine(record: RunRecord, progress: Progress, device: torch.device, began: float) -> None:
    progress.begin("finish")
    record.machine = describe_machine(device.type) | {
        "seconds": round(time.monotonic() - began, 3),
        "stage_seconds": {stage: round(s, 3) for stage, s in progress.seconds.items()},
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
    }


def verify(
    source_name: str,
    checkpoint: str,
    recipe: Recipe,
    *,
    evaluation: Path | None = None,
    device_name: str = "auto",
    console: Console | None = None,
    quiet: bool = False,
) -> RunRecord:
    """The independent proof: KL of `checkpoint`, as its files are read back, against `source_name`."""
    began = time.monotonic()
    device = choose_device(device_name)
    dtype = choose_dtype(recipe, device)
    source, quantized = open_model(source_name), open_model(checkpoint)
    a, b = source.adapter, quantized.adapter
    if (a.family, a.n_blocks, a.hidden_size, a.vocab_size) != (b.family, b.n_blocks, b.hidden_size, b.vocab_size):
        raise InputError(f"{checkpoint} is no version of {source_name}: their families or sizes differ")
    texts = prepare_texts(source, recipe, None, evaluation, needs_calibration=False)
    parameters = sum(torch.Size(shape).numel() for shape in a.expected().values())
    low_bit = quantized.source.schemes if not isinstance(quantized.source, Folder) else {}
    shapes = a.expected()
    quantized_parameters = sum(torch.Size(shapes[f"{module}.weight"]).numel() for module in low_bit)
    quantized_bytes = sum(
        info.nbytes for name, info in quantized.folder.infos.items() if name.rpartition(".")[0] in low_bit
    )
    record = RunRecord(
        command="verify",
        onecard=__version__,
        model=source.facts(),
        recipe={},
        texts=texts.facts,
        plan={
            "emitted_bytes": quantized.folder.file_bytes,
            "source_bytes": source.folder.weight_bytes,
            "bits_per_weight": quantized.folder.file_bytes * 8 / parameters,
            "quantized_bits_per_weight": quantized_bytes * 8 / max(1, quantized_parameters),
            "quantized_share": quantized_parameters / parameters,
        },
        versions=package_versions(),
        warnings=a.faults(source.config),
    )
    with (
        tempfile.TemporaryDirectory(prefix="onecard-verify-") as folder,
        Progress(f"onecard verify {checkpoint}", a.n_blocks, console, quiet) as progress,
    ):
        record.kl = _compare(
            source, Side("quantized", b, quantized.source), texts, recipe.batch_tokens, Path(folder) / "acts",
            device, dtype, progress,
        )  # fmt: skip
        _close_machine(record, progress, device, began)
    return record


@dataclass(frozen=True)
class PlanResult:
    """What `onecard plan` shows."""

    model: Model
    recipe: Recipe
    plan: Plan
    cost: Cost
    warnings: list[str]

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        return {
            "model": self.model.name,
            "recipe": self.recipe.name,
            **plan_facts(self.plan),
            "role_bytes": self.plan.role_bytes,
            "estimated_seconds": self.cost.seconds,
            "estimated_ram_bytes": self.cost.ram_bytes,
            "estimated_device_bytes": self.cost.device_bytes,
            "estimated_disk_bytes": self.cost.disk_bytes,
        }


def plan(model_name: str, recipe: Recipe, device_name: str = "auto") -> PlanResult:
    """What quantizing would emit and take; reads headers only."""
    device = choose_device(device_name)
    dtype = choose_dtype(recipe, device)
    model = open_source(model_name)
    laid_out = plan_for(model, recipe)
    method = method_of(recipe)
    cost = estimate(
        model.adapter,
        laid_out,
        method.needs_statistics,
        recipe.calibration_rows * recipe.calibration_row_tokens if method.needs_statistics else 0,
        recipe.evaluation_rows * recipe.evaluation_row_tokens,
        dtype.itemsize,
        measure_flops(device, dtype),
        device,
        site_budget(device),
    )
    return PlanResult(model, recipe, laid_out, cost, model.adapter.faults(model.config))


def inspect(model_name: str) -> dict[str, Any]:
    """Facts of a checkpoint, original or quantized, from config.json and headers alone."""
    model = open_model(model_name)
    adapter, folder = model.adapter, model.folder
    shapes = adapter.expected()
    schemes = {} if isinstance(model.source, Folder) else model.source.schemes
    roles: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        role = roles.setdefault(adapter.role(name).value, {"parameters": 0, "widths": {}})
        count = torch.Size(shape).numel()
        role["parameters"] += count
        scheme = schemes.get(name.removesuffix(".weight"))
        width = f"int{scheme.bits} group {scheme.group_size}" if scheme else model.source.info(
            adapter.locate(name, model.source.names).tensor).dtype  # fmt: skip
        role["widths"][width] = role["widths"].get(width, 0) + count
    parameters = sum(role["parameters"] for role in roles.values())
    moe_blocks = [b for b in range(adapter.n_blocks) if any(s.role is Role.EXPERT for s in adapter.sites(b))]
    return {
        "model": model_name,
        "path": str(model.path),
        "family": adapter.family,
        "blocks": adapter.n_blocks,
        "moe_blocks": len(moe_blocks),
        "experts": adapter.n_experts,
        "experts_per_token": adapter.top_k,
        "hidden_size": adapter.hidden_size,
        "vocab_size": adapter.vocab_size,
        "vision": adapter.has_vision,
        "quantized": model.quantized,
        "parameters": parameters,
        "file_bytes": folder.file_bytes,
        "shards": len(folder.shards),
        "bits_per_weight": folder.file_bytes * 8 / parameters,
        "roles": roles,
        "config_faults": adapter.faults(model.config),
    }
