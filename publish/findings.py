"""What a check of a folder found, and how it is told."""

from dataclasses import dataclass, field
from typing import Any

from ..core.errors import DamageError, InputError

# This many problems are listed in the message; the JSON line has them all.
SHOWN = 40


@dataclass
class Checked:
    """What `check` found. `problems` and `unchecked` are lines for people, `facts` are counts."""

    checkpoint: str
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not self.problems

    def line(self) -> dict[str, Any]:
        """The JSON line for scripts."""
        return {
            "checkpoint": self.checkpoint,
            "sound": self.sound,
            **self.facts,
            "problems": self.problems,
            "not_checked": self.unchecked,
        }

    def refuse(self) -> None:
        """Raises DamageError when anything is wrong: one message that lists every problem."""
        if self.sound:
            return
        lines = [f"  - {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  - and {len(self.problems) - SHOWN} more, all in the JSON line")
        raise DamageError(
            "\n".join(
                [
                    f"{self.checkpoint} is not what its papers say:",
                    *lines,
                    "Fetch these files again, or make the checkpoint anew; do not use it as it is.",
                ]
            )
        )


def listed(names: list[str]) -> str:
    """'a is', 'a and b are', 'a, b, c and 4 more are'."""
    if len(names) == 1:
        return f"{names[0]} is"
    first, rest = names[:3], len(names) - 3
    return f"{', '.join(first)} and {rest} more are" if rest > 0 else f"{', '.join(first[:-1])} and {first[-1]} are"


def offenders(error: InputError) -> list[str]:
    """The problems that a message lists, or the message itself."""
    listed = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
    return listed or [str(error)]
