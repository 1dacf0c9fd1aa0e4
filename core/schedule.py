"""What a long job expects to do: its stages in order, and what each is expected to take.

The planner makes such lists, a Step is given one, and report/eta.py corrects it by what is measured.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """One stage of a job."""

    # What a reader calls it: "block 3", "verify head".
    name: str
    # Stages of one kind err alike: a finished one corrects those to come.
    kind: str
    # Seconds by the plan. Without a plan, shares of the work in any unit (`Schedule.in_seconds`).
    weight: float
    # What Step.begin is told while the stage lasts, and the block.
    tasks: tuple[str, ...]
    block: int | None = None
    # What Step.advance is told in all. 0: not known beforehand.
    tokens: int = 0
    # How often Step.begin is called in all. 0: not known beforehand.
    begins: int = 0


@dataclass(frozen=True)
class Schedule:
    """The stages of a whole job, in order."""

    stages: tuple[Expected, ...] = ()
    # Whether weights are seconds: then there is an estimate before anything is measured.
    in_seconds: bool = True
    # Whether the work may end earlier than that.
    at_most: bool = False

    def __add__(self, other: "Schedule") -> "Schedule":
        """This job, then the other, both in seconds."""
        assert self.in_seconds
        assert other.in_seconds
        return Schedule(self.stages + other.stages)
