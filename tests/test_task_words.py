"""How items are put to a model: the embedded questions, data sets of the hub by their columns, chats and plain text.

Nothing is fetched: `datasets.load_dataset` is replaced by one that gives small sets with the real columns.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Llama4ForConditionalGeneration

from onecard.calibration.tokens import Encoder
from onecard.checkpoint.model import open_model
from onecard.core.errors import InputError, ResourceError
from onecard.demo import measure, tokens
from onecard.eval.task_items import Item
from onecard.eval.task_requests import requests_of
from onecard.eval.tasks import Task, load_task
from onecard.models.known import demo_folder

Jsonl = Callable[..., Path]
GOOD = {"question": "Which?", "choices": ["this", "that"], "answer": 1}


@pytest.fixture(scope="module")
def encoder(baby: Callable[..., Path]) -> Encoder:
    """A baby's encoder: one token for each character, and a chat template that writes <s><|user|>...<|assistant|>..."""
    model = open_model(str(baby("qwen3")))
    return Encoder(model.path, model.adapter)


@pytest.fixture(scope="module")
def plain_encoder(encoder: Encoder) -> Any:
    """The same without a chat template."""
    tokenizer = Encoder(encoder.folder, encoder.adapter).tokenizer
    tokenizer.chat_template = None
    return SimpleNamespace(tokenizer=tokenizer)


def said(encoder: Any, task: Task) -> list[tuple[str, str]]:
    """(context, continuation) of every request, as text."""
    found = requests_of(task, encoder)
    return [(encoder.tokenizer.decode(r.context), encoder.tokenizer.decode(r.continuation)) for r in found]


# The embedded questions


def test_the_embedded_questions_are_scored_as_where_they_were_made() -> None:
    """The whole model answers some of the 400 questions alike by the demo's own script, which gave its README's
    accuracy, and as we ask them."""
    folder = demo_folder()
    task = load_task("demo", 0, None)
    assert len(task.items) == 400
    rows = {row["id"]: row for row in map(json.loads, (folder / "data" / "questions.jsonl").read_text().splitlines())}
    some = load_task("demo", 0, 8)
    opened = open_model("demo")
    requests = requests_of(some, Encoder(opened.path, opened.adapter))
    model = Llama4ForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = tokens.load(folder / "model")
    start = 0
    with torch.inference_mode():
        for item in some.items:
            assert item.right == rows[item.id]["answer"]
            expected = measure.option_scores(model, tokenizer, rows[item.id])
            own = requests[start : start + len(item.choices)]
            start += len(item.choices)
            for request, score in zip(own, expected, strict=True):
                logits = model(input_ids=torch.tensor([request.context + request.continuation])).logits[0].double()
                logp = torch.log_softmax(logits, -1)[len(request.context) - 1 : -1]
                got = logp.gather(1, torch.tensor(request.continuation)[:, None]).sum()
                assert float(got) == pytest.approx(float(score), abs=1e-3)
    assert start == len(requests)


# Data sets of the hub, by their real columns


def mmlu(split: str) -> list[dict[str, Any]]:
    subjects = ["anatomy", "law"] * (5 if split == "dev" else 3)
    return [
        {
            "question": f"{split} {n} of {subject}?",
            "subject": subject,
            "choices": ["a", "b", "c", f"d{n}"],
            "answer": n % 4,
        }
        for n, subject in enumerate(subjects)
    ]


def arc(split: str) -> list[dict[str, Any]]:
    letters, digits = ["A", "B", "C", "D"], ["1", "2", "3"]
    return [
        {
            "id": f"Mercury_{split}_{n}",
            "question": f"{split} {n}?",
            "choices": {"text": [f"t{i}" for i in range(4 - n % 2)], "label": digits if n % 2 else letters},
            "answerKey": "3" if n % 2 else "D",
        }
        for n in range(6)
    ]


def hellaswag(split: str) -> list[dict[str, Any]]:
    return [
        {
            "ind": n,
            "activity_label": "Roof",
            "ctx_a": "A man",
            "ctx_b": "he",
            "ctx": f"{split} {n}: a man. he",
            "endings": ["falls.", "climbs up the long ladder.", "sings.", "é."],
            "source_id": "x",
            "split": split,
            "split_type": "indomain",
            "label": str(n % 4),
        }
        for n in range(6)
    ]


@pytest.fixture
def data_sets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replaces `load_dataset`; gives the list of requests."""
    asked: list[tuple[Any, ...]] = []
    sets = {"cais/mmlu": mmlu, "allenai/ai2_arc": arc, "Rowan/hellaswag": hellaswag}

    def load_dataset(path: str, name: str | None = None, *, split: str) -> Dataset:
        asked.append((path, name, split))
        return Dataset.from_list(sets[path](split))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_mmlu(data_sets: list[tuple[Any, ...]], encoder: Encoder) -> None:
    """Five examples of a question's own subject, options as letters, the right letter as the answer."""
    task = load_task("mmlu", 5, None)
    assert data_sets == [("cais/mmlu", "all", "test"), ("cais/mmlu", "all", "dev")]
    assert [(i.group, i.right) for i in task.items[:3]] == [("anatomy", 0), ("law", 1), ("anatomy", 2)]
    for subject in ("anatomy", "law"):
        assert len(task.examples[subject]) == 5
        assert all(f"of {subject}?" in example.question for example in task.examples[subject])
    asked = said(encoder, task)
    assert len(asked) == 4 * 6
    for item, four in zip(task.items, [asked[n : n + 4] for n in range(0, 24, 4)], strict=True):
        assert [option for _, option in four] == ["A", "B", "C", "D"]
        (context,) = {context for context, _ in four}
        assert context.count("<|user|>") == 6
        assert context.endswith(
            f"{item.question}\nA. a\nB. b\nC. c\nD. {item.choices[3]}\nAnswer with the letter.<|assistant|>"
        )
        for example in task.examples[item.group]:
            letter = "ABCD"[example.right]
            assert f"D. {example.choices[3]}\nAnswer with the letter.<|assistant|>{letter}<|user|>" in context


def test_arc(data_sets: list[tuple[Any, ...]], plain_encoder: Any) -> None:
    """Labels are letters or digits, examples come from the training split, and without a template all is plain text."""
    task = load_task("arc-challenge", 2, None)
    assert data_sets == [("allenai/ai2_arc", "ARC-Challenge", "test"), ("allenai/ai2_arc", "ARC-Challenge", "train")]
    assert [(len(i.choices), i.right) for i in task.items[:2]] == [(4, 3), (3, 2)]
    assert task.items[0].id == "Mercury_test_0"
    first, second = task.examples[""]
    asked = said(plain_encoder, task)
    assert len(asked) == 3 * (4 + 3)
    context, option = asked[0]
    assert "<|user|>" not in context

    def block(item: Item) -> str:
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", item.choices, strict=False))
        return f"Question: {item.question}\n{listed}\nAnswer with the letter.\nAnswer:"

    shown = "".join(f"{block(one)} {'ABCD'[one.right]}\n\n" for one in (first, second))
    assert context + option == f"<s>{shown}{block(task.items[0])} A"
    assert [(c + o)[-1] for c, o in asked[:7]] == list("ABCDABC")
    assert load_task("arc-easy", 0, None).name == "arc-easy"
    assert data_sets[-1] == ("allenai/ai2_arc", "ARC-Easy", "test")


def test_hellaswag(data_sets: list[tuple[Any, ...]], encoder: Encoder) -> None:
    """HellaSwag continues a text: no chat template is used, and scores are divided by the ending's bytes."""
    task = load_task("hellaswag", 0, 3)
    assert data_sets == [("Rowan/hellaswag", None, "validation")]
    assert task.normalized
    asked = said(encoder, task)
    for item, four in zip(task.items, [asked[n : n + 4] for n in range(0, 12, 4)], strict=True):
        # The third letter is not in the baby's vocabulary.
        texts = [f"<s>{item.question} {ending}".replace("é", "<unk>") for ending in item.choices]
        assert [context + option for context, option in four] == texts
        assert {context for context, _ in four} == {f"<s>{item.question}"}
    assert [item.right for item in task.items] == [int(item.id) % 4 for item in task.items]


def test_the_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ResourceError) as caught:
        load_task("mmlu", 0, None)
    for needle in ("mmlu", "cais/mmlu", "ConnectionError", ".jsonl"):
        assert needle in str(caught.value)


def test_a_public_item_that_cannot_be_asked_is_the_users_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set that changed its columns: one message, not a traceback."""
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: Dataset.from_list([{"question": "?", "answer": 1}]))
    with pytest.raises(InputError, match=r"mmlu.*choices"):
        load_task("mmlu", 0, None)


# Wording and scores


def test_in_a_chat_the_option_is_the_whole_answer(encoder: Encoder, jsonl: Jsonl) -> None:
    task = load_task(str(jsonl("one.jsonl", [GOOD])), 0, None)
    context = "<s><|user|>Which?<|assistant|>"
    assert said(encoder, task) == [(context, "this"), (context, "that")]


def test_an_answer_is_with_the_mark_that_ends_it() -> None:
    """The embedded model's template ends a turn, and the end mark counts as a token of the option."""
    opened = open_model("demo")
    encoder = Encoder(opened.path, opened.adapter)
    for context, option in said(encoder, load_task("demo", 0, 5)):
        assert option.endswith("<|eot|>")
        assert "<|eot|>" in context


@pytest.mark.parametrize("style", ["continue", "chat"])
def test_context_and_option_are_the_tokens_of_the_whole_text(jsonl: Jsonl, style: Any) -> None:
    """A real vocabulary merges tokens across the end of the context, so the whole text's tokens are scored."""
    opened = open_model("demo")
    encoder = Encoder(opened.path, opened.adapter)
    line = {"question": "The def", "choices": ["ault", "initely not", "self.x", "("], "answer": 0}
    loaded = load_task(str(jsonl("merging.jsonl", [line])), 0, None)
    loaded = Task(loaded.name, loaded.items, {}, 0, style, False)
    for request, choice in zip(requests_of(loaded, encoder), loaded.items[0].choices, strict=True):
        assert request.context
        whole = encoder.tokenizer.decode(request.context + request.continuation)
        assert choice in whole
        assert choice not in encoder.tokenizer.decode(request.context)
        again = encoder.tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert tuple(again) == request.context + request.continuation


def test_a_template_that_refuses_names_the_item(encoder: Encoder, jsonl: Jsonl) -> None:
    task = load_task(str(jsonl("one.jsonl", [GOOD | {"id": "the-first"}])), 0, None)
    other = Encoder(encoder.folder, encoder.adapter)
    other.tokenizer.chat_template = "{{ raise_exception('nobody may speak') }}"
    with pytest.raises(InputError) as caught:
        requests_of(task, other)
    assert "the-first" in str(caught.value)
    assert "nobody may speak" in str(caught.value)
