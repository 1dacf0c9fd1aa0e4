"""Digests of documents: calibration and evaluation share none, and a repeated text counts once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from command_line import Refuse
from documents import SAMPLE, conversation, draw_picture, picture
from onecard.calibration.documents import Document, refuse_shared
from onecard.calibration.sources import read_jsonl
from onecard.core.errors import InputError


def test_a_shared_text_is_found_in_other_spacing_and_case() -> None:
    left = [Document("a", "text", "One text, and  another.", None), Document("b", "text", "two", None)]
    right = [Document("c", "text", "one text,\nand another. ", None), Document("d", "text", "two three", None)]
    with pytest.raises(InputError, match="c is a of the calibration texts"):
        refuse_shared(left, right)
    talk = [{"role": "user", "content": [{"type": "text", "text": " Hello"}]}]
    same = [{"role": "user", "content": [{"type": "text", "text": "hello "}]}]
    with pytest.raises(InputError, match="1 evaluation texts"):
        refuse_shared([Document("a", "text", None, talk)], [Document("b", "text", None, same)])
    refuse_shared([Document("a", "text", None, talk)], [Document("b", "text", "hello", None)])


def test_a_text_that_stands_there_twice_is_one_draw(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    rows = [{"text": text} for text in ("one text of its own", "another one", "another one", "one text of its own")]
    arguments = ["--recipe", recipe(method="rtn"), "--evaluation", jsonl("twice.jsonl", rows)]
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out" / "onecard.json").read_text())
    assert record["kl"]["documents"] == 2
    assert any("2 of the evaluation texts repeat others" in warning for warning in record["warnings"])


PROMPT = "a long beginning that all texts share "


def test_texts_that_differ_behind_the_cut_are_one_draw_without_an_interval(
    baby: Callable[..., Path],
    emitted: Callable[..., tuple[Path, Result]],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """24 texts, cut where they are still alike, are one row. A record of one row serves no gate, and `baseline` says
    so at once."""
    same = jsonl("same.jsonl", [{"text": f"{PROMPT}{number}"} for number in range(24)])
    arguments = ["--recipe", recipe(evaluation_rows=24), "--evaluation", same]
    result = onecard("verify", baby("qwen3"), emitted("qwen3")[0], *arguments, "--record", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    kl = record["kl"]
    assert (kl["documents"], record["texts"]["evaluation"]["rows"]) == (1, 1)
    assert (kl["kl_low_nats"], kl["kl_high_nats"], kl["same_top1_low"]) == (None, None, None)
    _, repeats, few = record["warnings"]
    assert repeats.startswith("23 of the evaluation texts repeat others in their first 24 tokens")
    assert few.startswith("1 evaluation document")


def test_a_row_that_calibration_begins_with_is_refused_though_the_texts_differ_behind_it(
    refuse: Refuse, baby: Callable[..., Path], recipe: Callable[..., Path], jsonl: Callable[..., Path]
) -> None:
    """Every token that would be scored stands word for word in a calibration text."""
    ours = jsonl("ours.jsonl", [{"text": f"{PROMPT}and ends so {n}"} for n in range(9)])
    theirs = jsonl("theirs.jsonl", [{"text": f"{PROMPT}and ends otherwise"}, {"text": "something else"}])
    given = ["--calibration", ours, "--evaluation", theirs]
    needles = ["1 evaluation row of 24 tokens stand in the calibration texts", "theirs:1 begins as ours:"]
    refuse(baby("qwen3"), *needles, arguments=given)
    refuse(baby("qwen3"), *needles, arguments=given, use=recipe(method="fast"))


def test_texts_that_share_most_of_their_rows_get_a_warning(
    baby: Callable[..., Path],
    emitted: Callable[..., tuple[Path, Result]],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    same = jsonl("same.jsonl", [{"text": f"{PROMPT}{number}"} for number in range(24)])
    arguments = ["--recipe", recipe(evaluation_rows=24, evaluation_row_tokens=60), "--evaluation", same]
    result = onecard("verify", baby("qwen3"), emitted("qwen3")[0], *arguments, "--record", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["kl"]["documents"] == 24
    (warning,) = record["warnings"]
    assert "of the scored tokens stand in a beginning that several evaluation texts share" in warning


def test_texts_of_which_most_is_not_used(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    rows = [{"text": "a word and one more " * 200}, {"text": "short"}]
    arguments = ["--recipe", recipe(method="rtn"), "--evaluation", jsonl("long.jsonl", rows)]
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out" / "onecard.json").read_text())
    facts = record["texts"]["evaluation"]
    assert facts["tokens"] < facts["tokens_given"] / 10
    warning, few = record["warnings"]
    assert few.startswith("2 evaluation documents")
    assert f"{facts['tokens']:,} of the {facts['tokens_given']:,} tokens" in warning
    assert "evaluation_row_tokens" in warning
    assert "evaluation_row_tokens" in result.stderr


def test_digest_is_of_what_a_model_sees(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.png", "red")
    draw_picture(tmp_path / "b.png", "blue")
    first, renamed = read_jsonl(jsonl("x.jsonl", [{"text": "one", "id": "x"}, {"text": "one", "id": "y", "kind": "z"}]))
    assert first.digest == renamed.digest
    rows = [conversation(picture("a.png")), conversation(picture("b.png"))]
    red, blue = (document.digest for document in read_jsonl(jsonl("y.jsonl", rows)))
    draw_picture(tmp_path / "a.png", "green")
    green, still_blue = (document.digest for document in read_jsonl(tmp_path / "y.jsonl"))
    assert len({red, green, blue}) == 3
    assert still_blue == blue
    user, assistant = ([{"role": role, "content": "one"}] for role in ("user", "assistant"))
    digests = {Document("x", "text", None, m).digest for m in (user, assistant)} | {first.digest}
    assert len(digests) == 3


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.lists(st.sampled_from("abcdefgh"), unique=True))
def test_refuse_shared_names_all_that_is_shared_and_nothing_else(left: list[str], right: list[str]) -> None:
    calibration = [Document(f"C-{t}-", "text", f"text {t}", None) for t in left]
    evaluation = [Document(f"E-{t}-", "text", f"text {t}", None) for t in right]
    shared = set(left) & set(right)
    if not shared:
        refuse_shared(calibration, evaluation)
        return
    with pytest.raises(InputError) as caught:
        refuse_shared(calibration, evaluation)
    said = str(caught.value)
    assert {t for t in "abcdefgh" if f"E-{t}-" in said} == shared
    assert {t for t in "abcdefgh" if f"C-{t}-" in said} == shared


def test_evaluation_that_shares_documents_with_calibration(
    baby: Callable[..., Path], refuse: Refuse, jsonl: Callable[..., Path]
) -> None:
    calibration = jsonl("c.jsonl", SAMPLE)
    evaluation = jsonl("e.jsonl", [{"text": "held out"}, SAMPLE[4] | {"id": "four"}, SAMPLE[7] | {"id": "seven"}])
    refuse(
        baby("llama4-text"),
        "four",
        "seven",
        "c:5",
        "c:8",
        arguments=["--calibration", calibration, "--evaluation", evaluation],
    )
