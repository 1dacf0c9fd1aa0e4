"""A text of any length has the ids of the whole text, and takes the memory of a piece."""

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onecard.calibration.pieces import token_ids
from onecard.models.known import demo_folder

DATA = demo_folder() / "data"


@pytest.fixture(scope="module")
def demo() -> Any:
    return AutoTokenizer.from_pretrained(str(demo_folder() / "model"), local_files_only=True)


@pytest.fixture(scope="module")
def spaced() -> Any:
    """A tokenizer in the manner of Mixtral's: a space is put before a text, and merges may run over all of it."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    raw.train_from_iterator(
        [(DATA / "calibration.jsonl").read_text()[:60_000]],
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"]),
    )
    raw.pre_tokenizer = None
    raw.decoder = decoders.Replace("\u2581", " ")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def whole(tokenizer: Any, text: str, specials: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=specials)["input_ids"])


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "def f(x):\n    return x\n",
                "it's ",
                "don\u2019t ",
                "    ",
                "\n\n",
                "\r\n",
                "\t",
                "12345",
                "a" * 70,
                "<|eot|>",
            ]
        ),
        st.sampled_from(
            [
                "caf\u00e9 ",
                "e\u0301",
                "\u4f60\u597d\u3002",
                "\U0001f600 ",
                "\u00a0",
                "\u2028",
                "---",
                "<|begin_of_text|>",
            ]
        ),
        st.text(st.characters(codec="utf-8"), max_size=12),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=150)
@given(parts=PIECES, specials=st.booleans(), piece=st.integers(8, 90), context=st.integers(8, 64))
@example(parts=["word " * 200], specials=True, piece=50, context=20)
@example(parts=["x" * 900], specials=True, piece=50, context=20)
@example(parts=[" " * 300, "x", " " * 300], specials=True, piece=40, context=12)
def test_pieces_give_the_ids_of_the_whole(
    demo: Any, parts: list[str], specials: bool, piece: int, context: int
) -> None:
    text = "".join(parts)
    assert token_ids(demo, text, specials, piece, context).tolist() == whole(demo, text, specials)


@settings(max_examples=40)
@given(parts=PIECES, piece=st.integers(8, 90), context=st.integers(24, 64))
def test_also_where_a_space_is_put_before_a_text(spaced: Any, parts: list[str], piece: int, context: int) -> None:
    text = "".join(parts)
    assert token_ids(spaced, text, True, piece, context).tolist() == whole(spaced, text, True)


@pytest.mark.parametrize("name", ["calibration.jsonl", "evaluation.jsonl"])
def test_real_texts_in_many_pieces(demo: Any, spaced: Any, name: str) -> None:
    text = (DATA / name).read_text(encoding="utf-8")[:200_000]
    for tokenizer in (demo, spaced):
        assert token_ids(tokenizer, text, True, 3_000, 300).tolist() == whole(tokenizer, text, True)


CHILD = """
import resource, sys
from transformers import AutoTokenizer
from onecard.calibration.pieces import token_ids
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
text = "a line of words, numbers 123 and signs: (x) -> y\\n" * 30_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(token_ids(tokenizer, text, True)) > 250_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_memory_of_a_long_text_is_that_of_a_piece() -> None:
    """1.5 MB take some 60 MB; in one piece they take 260."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(demo_folder() / "model")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 130 * 1024
