"""What every part of a record is made of: values that are checked when they are read and frozen afterwards.

Types are strict: a number that is written as a word is damage. A key that this version does not know is kept, so that a
record which is read and written again loses nothing. A key that the writer left out is not written.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Strict

T = TypeVar("T")
# JSON has no tuple: its lists become tuples. Their entries stay strict.
Many = Annotated[tuple[T, ...], Strict(False)]
# For figures that may be whole: an int stays an int when it is written again.
Number = int | float


class RecordPart(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """The keys that were set, by their names in the file."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)
