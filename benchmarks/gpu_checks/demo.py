"""`make demo`'s job on the card: twice, and killed and resumed, with the same bytes each time; and its KL beside a
CPU's."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from gpu_checks.processes import Checks, Setup, TimeUpError, command, in_child, needed, read_record, run, table
from gpu_checks.scout import recipe_of, write_synthetic
from kill_resume import digests, stage

# Each process is killed after this share of the undisturbed run's seconds, and the next one resumes.
KILLED_AFTER = (0.15, 0.3, 0.45, 0.3, 0.6, 0.5)
KILLED_AFTER_SMALL = (0.5,)


def demo(setup: Setup) -> dict[str, Any]:
    folder, checks = setup.place("demo"), Checks()
    args = _small_job(setup, folder) if setup.small else ["demo", "--recipe", "demo"]
    log, (model, *flags) = folder / "log.txt", args
    whole, again, killed = (folder / name for name in ("whole", "again", "killed"))
    for out in (whole, again, killed):
        _remove(out)
    seconds = needed(setup, ["quantize", model, str(whole), *flags], log)
    needed(setup, ["quantize", model, str(again), *flags], log)
    expected = digests(whole)
    checks.add("twice", digests(again) == expected, f"{len(expected)} files, but for the record's `machine`")
    struck = _killed_and_resumed(setup, ["quantize", model, str(killed), *flags], seconds, log)
    checks.add("killed and resumed", digests(killed) == expected and bool(struck), "; ".join(struck))
    record = read_record(whole)
    figures = {"seconds": record["machine"]["seconds"], **_kl(record)}
    rows = [(record["machine"]["device"], *figures.values())]
    on_cpu = None if setup.on_cpu else _on_a_cpu(setup, args, folder, log)
    if on_cpu is not None:
        near = abs(figures["kl_mean_nats"] / on_cpu["kl_mean_nats"] - 1) < 0.2
        checks.add("KL as a CPU's", near, "within 20 % (bf16 rows beside fp32 rows)")
        rows.append(("cpu", *on_cpu.values()))
    head = ("device", "seconds", "mean KL, nats", "same top-1", "changed routes")
    found = {"ok": checks.ok, "checks": checks.facts(), "device": record["machine"]["device"], "figures": figures}
    return found | {"cpu": on_cpu, "table": f"{checks.table()}\n\n{table(head, rows)}"}


def _small_job(setup: Setup, folder: Path) -> list[str]:
    """A model of two small blocks in place of the embedded one."""
    model, recipe = write_synthetic(setup, folder, 2), folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("fast", setup)))
    texts = [f"--{which}={folder / which}.jsonl" for which in ("calibration", "evaluation")]
    return [str(model), "--recipe", str(recipe), *texts]


def _remove(out: Path) -> None:
    for path in (out, out.with_name(f"{out.name}.work")):
        shutil.rmtree(path, ignore_errors=True)


def _killed_and_resumed(setup: Setup, args: list[str], whole: float, log: Path) -> list[str]:
    """Where each kill struck. A run that ends before its kill has been killed often enough."""
    out, struck = Path(args[2]), []
    for share in KILLED_AFTER_SMALL if setup.small else KILLED_AFTER:
        begun = out.exists() or out.with_name(f"{out.name}.work").exists()
        status, _ = run(setup, [*args, *(["--resume"] if begun else [])], log, seconds=share * whole)
        if status == 0:
            return struck
        if status != -9:
            raise RuntimeError(f"a resumed run ended with {status}:\n{log.read_text()[-2000:]}")
        struck.append(f"at {share:.0%}: {stage(out.with_name(f'{out.name}.work'))}")
    begun = out.exists() or out.with_name(f"{out.name}.work").exists()
    needed(setup, [*args, *(["--resume"] if begun else [])], log)
    return struck


def _kl(record: dict[str, Any]) -> dict[str, float]:
    return {key: record["kl"][key] for key in ("kl_mean_nats", "same_top1", "changed_routes")}


def _on_a_cpu(setup: Setup, args: list[str], folder: Path, log: Path) -> dict[str, float] | None:
    """The figures of the same job on this machine's CPU; None if the time does not suffice."""
    out, (model, *flags) = folder / "cpu", args
    _remove(out)
    try:
        status, _ = in_child(setup, command, ["quantize", model, str(out), *flags, "--device", "cpu"], log)
    except TimeUpError:
        return None
    record = read_record(out) if status == 0 else None
    return None if record is None else {"seconds": record["machine"]["seconds"], **_kl(record)}
