"""JSON as every program reads it: a number that is not finite is refused, never written.

Everything that the package prints or writes as JSON, and every digest of JSON, goes through `json_text`.
"""

import json
import math
from typing import Any

from .errors import NonfiniteError

# Python reads and writes these words, and JSON does not have them.
_WORDS = {math.inf: "Infinity", -math.inf: "-Infinity"}


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON text. `options` are those of `json.dumps`. Raises NonfiniteError with every place."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        found = nonfinite(value)
        if not found:
            raise
    places = ", ".join(f"{place} is {word}" for place, word in found[:8])
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    raise NonfiniteError(
        f"a figure is not a finite number, and was not written: {places}{more}. The models' numbers are out of range: "
        "`onecard check` looks for damaged weights"
    )


def nonfinite(data: Any) -> list[tuple[str, str]]:
    """(place, what stands there) of every number in `data` that JSON does not have, in their order."""
    found: list[tuple[str, str]] = []
    todo: list[tuple[tuple[object, ...], Any]] = [((), data)]
    while todo:
        place, value = todo.pop()
        if isinstance(value, dict):
            todo += [((*place, key), entry) for key, entry in value.items()]
        elif isinstance(value, list | tuple):
            todo += [((*place, number), entry) for number, entry in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            found.append((".".join(map(str, place)), _WORDS.get(value, "NaN")))
    return found[::-1]
