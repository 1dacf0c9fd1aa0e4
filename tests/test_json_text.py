"""No JSON of ours holds NaN or Infinity: every line, record, state file and digest is made in one place.

That place is core/json_text.py. No other module makes JSON (test_structure.py), and the place refuses
such numbers wherever they stand.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from command_line import refused, strict
from gate_records import record
from onecard.checkpoint import files
from onecard.commands.shared import print_json, verb
from onecard.core.errors import NonfiniteError
from onecard.core.json_text import json_text, nonfinite
from onecard.core.record.reading import check_record

BAD = st.sampled_from([math.nan, math.inf, -math.inf])
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.floats(allow_nan=False, allow_infinity=False)
)


def nested(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.text(max_size=3), inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
        ),
        max_leaves=8,
    )


@given(nested(st.one_of(PLAIN, BAD)))
def test_json_is_strict_or_refused(value: Any) -> None:
    """What is written is read back strictly; what is refused holds such a number, and its place leads to it."""
    found = nonfinite(value)
    if not found:
        assert strict(json_text(value)) == json.loads(json.dumps(value))
        return
    with pytest.raises(NonfiniteError):
        json_text(value)
    loose = json.dumps(value)  # texts of three letters: NaN in one stands in quotes
    assert len(found) == len(re.findall(r'(?<!")(NaN|-?Infinity)', loose))


def test_a_line_that_json_cannot_hold_is_one_message() -> None:
    """Of a verb: exit code 1, nothing on stdout, and the place of the number."""

    @click.command()
    @verb
    def told() -> None:
        print_json({"figures": [1.0, math.nan]})

    refused(CliRunner().invoke(told), "figures.1 is NaN", code=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_record_is_written_with_a_number_that_is_not_finite(tmp_path: Path, bad: float) -> None:
    """Also where the record's own checks were gone round: parts are frozen, and copies are not checked again."""
    sound = check_record(record(), "sound")
    assert sound.kl is not None
    sound.kl = sound.kl.model_copy(update={"kl_mean_nats": bad})
    with pytest.raises(NonfiniteError, match=r"kl\.kl_mean_nats is (NaN|Infinity)"):
        files.write_json(tmp_path / "record.json", sound.to_json())
    assert list(tmp_path.iterdir()) == []
