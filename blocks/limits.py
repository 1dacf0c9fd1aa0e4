"""Calibration coverage of the blocks that are finished: the recipe's limits on it, and the record's summary of it.

A run stops at the block that passes a limit. Limits on the finished checkpoint are judged elsewhere (eval/gate.py).
"""

from pathlib import Path

from ..core.errors import LimitError
from ..core.limits import Limits
from ..core.record.blocks import BlockFacts


def refuse_passed(blocks: list[BlockFacts], limits: Limits, work: Path) -> None:
    """Raises LimitError when the last of these finished blocks passes a limit. What is finished stays in `work`."""
    if not blocks:
        return
    last = blocks[-1]
    starved = [f"expert {e} got {n} rows" for e, n in enumerate(last.expert_rows) if n < limits.fail_below_expert_rows]
    if starved:
        raise LimitError(
            f"block {last.block}: {', '.join(starved[:8])}, and the recipe fails below "
            f"{limits.fail_below_expert_rows} (fail_below_expert_rows): give more or more varied calibration texts "
            f"and start anew with --overwrite. What is finished lies in {work}"
        )
    fallbacks = sum(block.diagonal_fallbacks for block in blocks)
    if fallbacks > limits.max_fallbacks:
        raise LimitError(
            f"the second moments of {fallbacks} matrices could not be factored, and the recipe allows "
            f"{limits.max_fallbacks} (max_fallbacks): raise damping or shrinkage, or give more calibration texts, "
            f"and start anew with --overwrite. What is finished lies in {work}"
        )


def coverage_facts(blocks: list[BlockFacts], enough: int) -> dict[str, int]:
    """The record's `fallbacks`; empty for a run without experts or statistics. An expert with fewer than `enough`
    calibration rows is starved."""
    rows = [count for block in blocks for count in block.expert_rows]
    if not rows:
        return {}
    return {
        "experts_in_all": len(rows),
        "least_rows_of_an_expert": min(rows),
        "experts_without_rows": sum(count == 0 for count in rows),
        "experts_starved": sum(count < enough for count in rows),
        "damping_raised": sum(block.damping_raised for block in blocks),
        "diagonal_fallbacks": sum(block.diagonal_fallbacks for block in blocks),
    }


def coverage_warning(facts: dict[str, int], enough: int) -> list[str]:
    """`facts`: of coverage_facts. No warning, or one."""
    if not facts.get("experts_starved"):
        return []
    return [
        f"{facts['experts_starved']} of {facts['experts_in_all']} experts got fewer than {enough} calibration rows "
        "and borrowed from their layers: give more or more varied calibration texts"
    ]
