"""Multiple-choice tasks: items of the embedded questions and of local files, their number, and answers from scores."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from onecard.core.errors import InputError
from onecard.eval.choice import Scored
from onecard.eval.task_items import Item, item_of
from onecard.eval.tasks import Task, answered, flip_summary, load_task, repeated_warnings

Jsonl = Callable[..., Path]
GOOD = {"question": "Which?", "choices": ["this", "that"], "answer": 1}


def test_the_whole_of_the_demo_task_is_asked_by_its_name() -> None:
    """The digest covers the items and their wording, so another number of shots or items changes it."""
    task = load_task("demo", 0, None)
    assert (task.name, task.style, task.shots, task.examples) == ("demo", "chat", 0, {})
    digests = [task.digest, load_task("demo", 0, 399).digest, load_task("demo", 2, None).digest]
    assert len(set(digests)) == 3
    assert load_task("demo", 0, None).digest == task.digest
    assert load_task("demo", 0, 40).items == load_task("demo", 0, 40).items


# Local files


def test_items_of_a_jsonl_file(jsonl: Jsonl) -> None:
    """The answer as an index, a letter, a digit in quotes or the option's own text; an id or the item's number."""
    path = jsonl(
        "items.jsonl",
        [
            GOOD,
            "",
            GOOD | {"answer": "A", "id": "mine"},
            GOOD | {"answer": "that"},
            GOOD | {"answer": "0", "choices": ["x", "y", "z"]},
            GOOD | {"answer": 2, "choices": ["x", "y", "z"], "more": None},
        ],
    )
    task = load_task(str(path), 0, None)
    assert [item.right for item in task.items] == [1, 0, 1, 0, 2]
    assert [item.id for item in task.items] == ["1", "mine", "4", "5", "6"]
    assert task.items[1] == Item("mine", "Which?", ("this", "that"), 0)
    assert (task.name, task.normalized) == ("items.jsonl", False)


def test_items_of_a_parquet_file(tmp_path: Path, jsonl: Jsonl) -> None:
    lines = [GOOD | {"id": "a"}, {"id": None, "question": "What?", "choices": ["1", "2", "3"], "answer": 2}]
    path = tmp_path / "items.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    assert load_task(str(path), 0, None).items == load_task(str(jsonl("items.jsonl", lines)), 0, None).items


def test_a_question_may_hold_any_character(jsonl: Jsonl) -> None:
    """Other tools' JSON holds unescaped characters that str.splitlines takes for line ends."""
    odd = "first\u2028second\u0085third \u001c"
    line = json.dumps(GOOD | {"question": odd}, ensure_ascii=False).replace("\\u001c", "\u2029")
    (item,) = load_task(str(jsonl("odd.jsonl", ["\ufeff" + line])), 0, None).items
    assert item.question == odd.replace("\u001c", "\u2029")


BAD = {
    "[1, 2]": "is no object",
    '{"question": "Which?"}': "has no choices, answer",
    '{"question": " ", "choices": ["a", "b"], "answer": 0}': "question is empty",
    '{"question": 3, "choices": ["a", "b"], "answer": 0}': "question is empty",
    '{"question": "Which?", "choices": ["a"], "answer": 0}': "no two or more texts",
    '{"question": "Which?", "choices": ["a", ""], "answer": 0}': "no two or more texts",
    '{"question": "Which?", "choices": ["a", 3], "answer": 0}': "no two or more texts",
    '{"question": "Which?", "choices": "ab", "answer": 0}': "no two or more texts",
    '{"question": "Which\\ud800?", "choices": ["a", "b"], "answer": 0}': "surrogate pair in its question",
    '{"question": "Which?", "choices": ["a", "\\ud800"], "answer": 0}': "surrogate pair in its choices",
    '{"id": "\\ud800", "question": "Which?", "choices": ["a", "b"], "answer": 0}': "surrogate pair in its id",
    '{"question": "Which?", "choices": ["a", "b"], "answer": 2}': "2 names none",
    '{"question": "Which?", "choices": ["a", "b"], "answer": -1}': "-1 names none",
    '{"question": "Which?", "choices": ["a", "b"], "answer": "C"}': "'C' names none",
    '{"question": "Which?", "choices": ["a", "b"], "answer": true}': "True names none",
    '{"question": "Which?", "choices": ["a", "b"], "answer": 0.5}': "0.5 names none",
    '{"question": "Which?", "choices": ["a", "b"], "answer": "²"}': "'²' names none",
    '{"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "D"}': "'D' names none",
    '{"question": "Which?", "choices": {"text": ["a", "b"], "label": 7}, "answer": "A"}': "as many labels",
    '{"question": "Which?", "choices": {"text": null, "label": null}, "answer": "A"}': "no two or more texts",
    '{"question": "Which?", "choices": ["B", "A"], "answer": "A"}': "[0, 1]",
    '{"question": "Which?", "choices": ["7", "2", "1"], "answer": "1"}': "[1, 2]",
    '{"question": "Which?", "choices": ["a", "b"], "answer": "b", "id": "1"}': "the id '1' of item 1",
    "[" * 100_000: "is no JSON",
    '{"question": "Which?", "choices"': "is no JSON",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_item_is_named(jsonl: Jsonl, line: str) -> None:
    with pytest.raises(InputError) as caught:
        load_task(str(jsonl("items.jsonl", [GOOD, line])), 0, None)
    assert BAD[line] in str(caught.value)
    assert "2" in str(caught.value)


def test_a_label_of_the_items_own_comes_before_a_text() -> None:
    """ARC asks for numbers, and labels some of its options with numbers."""
    choices = {"text": ["4", "3", "2", "1"], "label": ["1", "2", "3", "4"]}
    line = {"question": "How many?", "choices": choices, "answerKey": "3"}
    assert item_of(line, "0", answer="answerKey").right == 2
    assert item_of(line | {"choices": choices | {"label": list("ABCD")}}, "0", answer="answerKey").right == 1


def test_every_bad_item_is_named_in_one_message(jsonl: Jsonl) -> None:
    """The message gives the line's number, which counts blank and broken lines."""
    path = jsonl(
        "items.jsonl",
        [
            GOOD,
            "",
            "{broken",
            GOOD | {"answer": 7},
            GOOD,
            {"question": "Which?", "answer": 0},
            GOOD | {"choices": []},
        ],
    )
    with pytest.raises(InputError) as caught:
        load_task(str(path), 0, None)
    message = str(caught.value)
    for number, problem in ((3, "is no JSON"), (4, "7 names none"), (6, "has no choices"), (7, "no two or more")):
        (line,) = [line for line in message.splitlines() if problem in line]
        assert str(number) in line, line
    assert '"choices": ["...", "..."]' in message


def test_what_is_no_task_is_refused(tmp_path: Path, jsonl: Jsonl) -> None:
    (tmp_path / "noise.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    for name, needle in (
        ("mmul", "mmlu"),
        (str(tmp_path), "no task"),
        (str(tmp_path / "missing.jsonl"), "no task"),
        (str(jsonl("items.txt", [GOOD])), "no task"),
        (str(jsonl("empty.jsonl", [])), "there is none"),
        (str(tmp_path / "noise.parquet"), "no Parquet"),
        (str(tmp_path / "latin.jsonl"), "cannot be read"),
    ):
        with pytest.raises(InputError) as caught:
            load_task(name, 0, None)
        assert needle in str(caught.value)


def test_item_of_reads_other_columns() -> None:
    item = item_of({"q": "?", "o": ["x", "y"], "a": 1, "s": "law"}, "7", "q", "o", "a", "s")
    assert item == Item("7", "?", ("x", "y"), 1, "law")


# Shots and numbers of items


def numbered(jsonl: Jsonl, count: int) -> str:
    return str(jsonl(f"{count}.jsonl", [GOOD | {"question": f"Which of {n}?", "answer": n % 2} for n in range(count)]))


def test_shots_of_a_file_are_its_own_items_and_are_not_asked(jsonl: Jsonl) -> None:
    path = numbered(jsonl, 12)
    task = load_task(path, 3, None)
    shown = task.examples[""]
    assert (len(shown), len(task.items)) == (3, 9)
    assert {i.question for i in shown} | {i.question for i in task.items} == {f"Which of {n}?" for n in range(12)}
    assert load_task(path, 3, None) == task
    assert len(load_task(path, 3, 4).items) == 4
    assert load_task(path, 3, 4).examples == task.examples


@pytest.mark.parametrize(("items", "shots"), [(3, 3), (3, 4), (1, 1)])
def test_too_few_items_for_the_shots(jsonl: Jsonl, items: int, shots: int) -> None:
    with pytest.raises(InputError, match=f"too few items for {shots} examples"):
        load_task(numbered(jsonl, items), shots, None)


def test_equal_items_are_not_left_out_for_being_shown(jsonl: Jsonl) -> None:
    """A file may hold a question twice. All items that are not shown as examples are asked."""
    path = jsonl("same.jsonl", [GOOD] * 10)
    task = load_task(str(path), 2, None)
    assert len(task.items) == 8


def test_a_limit_draws_items_from_everywhere(jsonl: Jsonl) -> None:
    path = numbered(jsonl, 200)
    ids = [int(item.id) for item in load_task(path, 0, 40).items]
    assert ids == sorted(set(ids))
    assert len(ids) == 40
    assert ids[-1] > 150
    assert len(load_task(path, 0, 500).items) == 200


# Scores


def test_scores_become_answers() -> None:
    """By item, in order; a normalised task divides each option's score by its text's bytes."""
    items = (Item("a", "?", ("x", "four"), 0), Item("b", "?", ("x", "y", "é"), 2))
    logp = [-3.0, -8.0, -1.0, -2.0, -1.5]
    scored = [Scored(p, p - 1, False, False) for p in logp]
    first, second = answered(Task("t", items, {}, 0, "chat", False), scored)
    assert (first.id, first.right, first.scores_reference) == ("a", 0, (-3.0, -8.0))
    assert (second.scores_reference, second.scores_quantized) == ((-1.0, -2.0, -1.5), (-2.0, -3.0, -2.5))
    first, second = answered(Task("t", items, {}, 0, "continue", True), scored)
    assert first.scores_reference == (-3.0, -2.0)
    assert first.reference == 1
    assert second.scores_quantized == (-2.0, -3.0, -1.25)


def test_facts_of_several_tasks() -> None:
    one = Task("one", (Item("a", "?", ("x", "y"), 0),), {}, 0, "chat", False)
    two = Task("two", (Item("a", "?", ("x", "y"), 0), Item("b", "?", ("x", "y"), 1)), {}, 5, "letters", False)
    right = [Scored(-1, -1, True, True), Scored(-2, -2, False, False)]
    wrong = [Scored(-2, -1, False, True), Scored(-1, -2, True, False)]
    facts = flip_summary([one, two], [right, right + wrong]).to_json()
    assert facts["all"]["task"] == "all"
    assert facts["all"]["items"] == 3
    assert "answers" not in facts["all"]
    assert [(t["task"], t["items"], t["shots"], t["digest"]) for t in facts["tasks"]] == [
        ("one", 1, 0, one.digest),
        ("two", 2, 5, two.digest),
    ]
    assert [a["id"] for a in facts["tasks"][1]["answers"]] == ["a", "b"]
    assert facts["all"]["changed"]["count"] == facts["all"]["right_to_wrong"]["count"] == 1
    assert facts["tasks"][0]["changed"]["count"] == 0


def test_items_that_ask_the_same_are_counted() -> None:
    first = Item("a", "?", ("x", "y"), 0)
    tasks = [Task("t", (first, replace(first, id="b"), replace(first, id="c", right=1)), {}, 0, "chat", False)]
    (line,) = repeated_warnings(tasks)
    assert "1 item of the task t" in line
    assert repeated_warnings([Task("t", (first,), {}, 0, "chat", False)]) == []
