"""SHA256SUMS: every file name survives a round trip, and names that lead out of the folder are refused.

test_check.py proves that sha256sum itself agrees and that every file of a run is listed.
"""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.checkpoint.checksums import SUMS_NAME, read_sums, sums_text
from onecard.core.errors import InputError


@given(
    st.dictionaries(
        st.text(
            st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=12
        ).filter(lambda name: name not in (".", "..")),
        st.binary(max_size=8),
        min_size=1,
        max_size=6,
    )
)
def test_sums_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    """Names with line ends and backslashes are escaped as sha256sum escapes them."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    path = tmp_path_factory.mktemp("sums") / SUMS_NAME
    path.write_bytes(sums_text(digests).encode())
    assert read_sums(path) == digests


def test_sums_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    digest = "0" * 64
    (tmp_path / SUMS_NAME).write_text(f"{digest}  ../../etc/passwd\n{digest}  a\n{digest} *a\nnot a line\n")
    with pytest.raises(InputError) as error:
        read_sums(tmp_path / SUMS_NAME)
    for needle in ("line 1", "line 3", "line 4"):
        assert needle in str(error.value)
