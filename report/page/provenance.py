"""Sections for checking and repeating the run: the gate's checks, digests, versions, machine, fallbacks."""

from collections.abc import Mapping
from typing import Any

from ...core.record.schema import Machine, Record, TextFacts
from ...core.units import clock, size
from .parts import Section, Table, table


def gate_section(record: Record) -> list[Section]:
    gate = record.gate
    if gate is None:
        return []
    failed = sum(not check.passed for check in gate.checks)
    against = "its limits" + (f" and the baseline {gate.baseline}" if gate.baseline else "")
    lede = (
        f"Held against {against}, every check was passed."
        if gate.passed
        else (f"Held against {against}, {failed:,} of {len(gate.checks):,} checks failed.")
    )
    said = [(check.name.replace("_", " "), "passed" if check.passed else "FAILED", check.said) for check in gate.checks]
    rows = [
        (check.name, check.kind, *map(_cell, (check.measured, check.low, check.high, check.allowed)))
        for check in gate.checks
    ]
    columns = ("check", "against", ">measured", ">low", ">high", ">allowed")
    tables = [table("Checks", ("check", "verdict", "what was found"), said)]
    tables += [table("Notes", ("note",), [(note,) for note in gate.notes])] if gate.notes else []
    return [
        Section("gate", "The gate", lede, tables=tuple(tables), folded=(table("Checks in figures", columns, rows),))
    ]


def _cell(value: object) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else None


def provenance_section(record: Record, absent: list[str]) -> Section:
    model, checkpoint = record.model, record.checkpoint
    origin: list[tuple[str, object]] = [
        ("command", f"onecard {record.command}"),
        ("onecard", record.onecard),
        ("record's schema version", record.schema_version),
        ("original", model.name),
        ("its family", model.family),
        ("its blocks and experts", f"{model.blocks} blocks, {model.experts} experts a block"),
        ("its digest", model.digest),
    ]
    if checkpoint is not None:
        origin += [("checkpoint", checkpoint.name or "not named"), ("its digest", checkpoint.digest)]
        origin += [("its bytes", f"{checkpoint.bytes:,}")] if checkpoint.bytes is not None else []
    if record.recipe:
        origin += [("recipe", record.recipe.get("name")), ("its digest", record.recipe.get("digest"))]
    origin.append(("computed in", record.measured_dtype))
    for which, facts in record.texts.items():
        origin += [
            (f"{which} texts", facts.source),
            ("rows, tokens", _rows(facts)),
            ("digest of its documents", facts.digest),
            ("digest of its rows", facts.rows_digest),
        ]
        if facts.tokens_by_kind:
            kinds = ", ".join(f"{kind} {n:,}" for kind, n in facts.tokens_by_kind.items())
            origin.append(("tokens by kind", kinds))
    open_tables = [table("Origin", ("what", "value"), [(name, value) for name, value in origin if value is not None])]
    if record.fallbacks:
        rows = [(key.replace("_", " "), f"{value:,}") for key, value in record.fallbacks.items()]
        open_tables.append(table("Coverage and fallbacks", ("what", ">count"), rows))
    if record.warnings:
        open_tables.append(table("Warnings", ("warning",), [(warning,) for warning in record.warnings]))
    folded: list[Table] = []
    if record.machine.to_json():
        folded.append(table("Machine, time and memory", ("what", "value"), _machine(record.machine)))
    if record.versions:
        folded.append(table("Versions", ("package", "version"), list(record.versions.items())))
    if record.recipe:
        folded.append(table("Recipe", ("key", "value"), list(_flat(record.recipe))))
    if record.files:
        folded.append(table("Files", ("file",), [(name,) for name in record.files]))
    lede = "What the run was made of. With the same digests, recipe and versions it can be repeated."
    if absent:
        lede += f" This record holds nothing on: {', '.join(absent)}."
    return Section("provenance", "Provenance", lede, tables=tuple(open_tables), folded=tuple(folded))


def _rows(facts: TextFacts) -> str:
    counts = {"documents": facts.documents, "rows": facts.rows, "tokens": facts.tokens}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count is not None)


def _machine(machine: Machine) -> list[tuple[str, str | None]]:
    rows: list[tuple[str, str | None]] = []
    for key, value in machine.to_json().items():
        name = key.replace("_", " ").removesuffix(" bytes").removesuffix(" seconds")
        if isinstance(value, dict):
            rows += [(f"{name}, {part}", f"{_cell(seconds)} s") for part, seconds in value.items()]
        elif key.endswith("_bytes") and isinstance(value, int):
            rows.append((name, size(value)))
        elif key == "seconds" and isinstance(value, int | float):
            rows.append(("time", clock(value)))
        else:
            rows.append((name, _cell(value)))
    return rows


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested keys as `a.b`, so that a recipe is one list."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{before}{key}.")
        elif value is not None:
            rows.append((before + key, str(value)))
    return rows
