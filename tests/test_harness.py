"""lm-evaluation-harness: pairs of texts as requests, and local tasks through the real harness where installed."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM

from onecard.calibration.tokens import Encoder
from onecard.checkpoint.model import open_model
from onecard.core.errors import InputError
from onecard.eval import twin
from onecard.eval.choice import OptionRequest
from onecard.eval.lm_eval_tasks import encode_pair
from onecard.eval.task_requests import requests_of
from onecard.eval.tasks import load_task

Run = Callable[..., Result]
BOS = 0


@pytest.fixture(scope="module")
def encoder(baby: Callable[..., Path]) -> Encoder:
    """A tokenizer with one token for each character, and one that begins a text."""
    model = open_model(str(baby("qwen3")))
    return Encoder(model.path, model.adapter)


def ids(encoder: Encoder, text: str) -> tuple[int, ...]:
    return tuple(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])


# --- pairs of texts, without the harness


@pytest.mark.parametrize(
    ("context", "continuation", "before", "after"),
    [
        ("who is it?", " me", "who is it?", " me"),
        ("who is it? ", "me", "who is it?", " me"),  # the space belongs to the word that it begins
        ("who \n", "me", "who", " \nme"),
        ("", "me", "", "me"),
        ("  ", "me", "", "  me"),
    ],
)
def test_where_a_pair_is_cut(encoder: Encoder, context: str, continuation: str, before: str, after: str) -> None:
    got = encode_pair(encoder, context, continuation)
    assert got == OptionRequest((BOS, *ids(encoder, before)), ids(encoder, after))


class Merging:
    """A tokenizer that adds no beginning token and merges "ab" into one token, even across the end of a context."""

    bos_token_id, eos_token_id = None, 9

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text.replace("ab", "X")]}


def test_tokens_that_are_merged_over_the_bound_are_asked_for_whole() -> None:
    encoder: Any = SimpleNamespace(tokenizer=Merging())
    assert encode_pair(encoder, "ca", "bd") == OptionRequest((ord("c"),), (ord("X"), ord("d")))
    # Without a beginning token, the ending one stands before the text.
    assert encode_pair(encoder, "", "d") == OptionRequest((9,), (ord("d"),))


def test_nothing_before_an_option_is_refused() -> None:
    encoder: Any = SimpleNamespace(tokenizer=Merging())
    with pytest.raises(InputError, match="nothing stands before the option 'bd'"):
        encode_pair(encoder, "a", "bd")


def test_the_way_to_the_extra_is_named(
    baby: Callable[..., Path], onecard: Run, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    refused(onecard("flips", baby("qwen3"), baby("qwen3"), "--tasks", "lm-eval:arc_easy"), "onecard[lm-eval]")


# --- the harness itself, with a local task


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a task's YAML with the changed keys and gives its path. Its data are a local file; nothing is fetched."""
    pytest.importorskip("lm_eval", reason="the extra onecard[lm-eval] is not installed")
    import yaml

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def put(items: list[dict[str, Any]] | None = None, **keys: Any) -> Path:
        items = items or [
            {"question": f"which {n}?", "choices": ["abc"[: n % 3 + 1], "d" * (n % 2 + 1), f"{n} e"], "answer": n % 3}
            for n in range(8)
        ]
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        config = {
            "task": "letters",
            "dataset_path": "json",
            "output_type": "multiple_choice",
            "test_split": "test",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "items.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        } | keys
        (tmp_path / "letters.yaml").write_text(yaml.safe_dump(config))
        return tmp_path / "letters.yaml"

    return put


def test_a_local_task_says_what_the_harness_says(
    task: Callable[..., Path],
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """`flips` by a task's name gives the accuracies of the harness's own evaluation, which scores both models in one
    walk. Its log-likelihoods of the original equal those of the whole model in transformers."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from onecard.eval import lm_eval_model as twin_lm

    source, (checkpoint, _) = baby("qwen3"), emitted("qwen3")
    path = task(metric_list=[{"metric": "acc"}], fewshot_split="test")
    record = tmp_path / "flips.json"
    tasks = ["--tasks", f"lm-eval:{path}", "--shots", 1, "--record", record]
    assert onecard("flips", source, checkpoint, *tasks).exit_code == 0
    told = json.loads(record.read_text())["flips"]["tasks"][0]
    assert (told["task"], told["items"], told["shots"]) == ("lm-eval:letters", 8, 1)

    walks = []
    monkeypatch.setattr(twin_lm, "twin_walk", lambda *a, **k: walks.append(1) or twin.twin_walk(*a, **k))
    pair = twin_lm.open_twin(str(source), str(checkpoint), device_name="cpu")
    for side, lm in (("reference", pair.reference), ("quantized", pair.quantized)):
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[str(path)],
            num_fewshot=1,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=TaskManager(include_defaults=False),
        )
        assert found["results"]["letters"]["acc,none"] == pytest.approx(told[f"accuracy_{side}"]["share"])
        if side == "reference":
            samples = found["samples"]["letters"]
    assert walks == [1]

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for sample in samples:
        for argument, response in zip(sample["arguments"], sample["resps"], strict=True):
            request = encode_pair(pair.encoder, *argument)
            whole = torch.tensor([request.context + request.continuation])
            with torch.inference_mode():
                logp = torch.log_softmax(model(whole).logits[0].double(), -1)
            at = torch.arange(len(request.context) - 1, whole.shape[1] - 1)
            chosen = logp[at, whole[0, len(request.context) :]]
            assert float(response[0][0]) == pytest.approx(float(chosen.sum()), rel=1e-4)
            assert response[0][1] == bool((logp[at].argmax(-1) == whole[0, len(request.context) :]).all())


def test_texts_scored_whole_are_cut_into_windows(
    task: Callable[..., Path], baby: Callable[..., Path], encoder: Encoder
) -> None:
    """loglikelihood_rolling: every token is predicted once, the first after the token that begins a text."""
    task()
    from onecard.eval import lm_eval_model as twin_lm

    source = baby("qwen3")
    pair = twin_lm.open_twin(str(source), str(source), device_name="cpu")
    walked: dict[Any, Any] = {}

    def walk(requests: Any) -> Any:
        scores = pair.scores(requests)
        walked.update(zip(requests, scores, strict=True))
        return scores

    reference = twin_lm.TwinModels(pair.encoder, walk, window_tokens=6).reference
    text = "abcdefghijklm"
    found = reference.loglikelihood_rolling([SimpleNamespace(args=(text,)), SimpleNamespace(args=("ab",))])
    assert sum(len(request.continuation) for request in walked) == len(text) + 2
    windows = [request for request in walked if request.continuation != ids(encoder, "ab")]
    assert found[0] == pytest.approx(sum(walked[request].logp_reference for request in windows))
    with pytest.raises(InputError, match="write"):
        reference.generate_until([])


def test_options_in_the_context_and_unconditional_ones(task: Callable[..., Path], encoder: Encoder) -> None:
    """One task puts the options into contexts with one continuation. Another also asks for options without context;
    those requests are left out."""
    items = [{"question": "it fell on _", "choices": ["him", "her"], "answer": 1, "rest": "and broke"}]
    contexts = '{{ [question.replace("_", choices[0]), question.replace("_", choices[1])] }}'
    swapped = task(items, doc_to_text="answer", doc_to_target="rest", target_delimiter=" ", doc_to_choice=contexts)
    got = load_task(f"lm-eval:{swapped}", 0, None)
    assert got.items[0].pairs == (("it fell on him", " and broke"), ("it fell on her", " and broke"))
    assert got.items[0].right == 1
    mutual = task(items, metric_list=[{"metric": "acc"}, {"metric": "acc_mutual_info"}])
    got = load_task(f"lm-eval:{mutual}", 0, None)
    assert got.items[0].pairs == (("it fell on _", " him"), ("it fell on _", " her"))
    assert len(requests_of(got, encoder)) == 2
    assert not got.normalized
    assert load_task(f"lm-eval:{task(items, metric_list=[{'metric': 'acc_norm'}])}", 0, None).normalized


def test_the_digest_tells_tasks_apart(task: Callable[..., Path]) -> None:
    texts = ("{{question}}", "Q {{question}}")
    digests = {load_task(f"lm-eval:{task(doc_to_text=text)}", 0, None).digest for text in texts}
    assert len(digests) == 2
    assert load_task(f"lm-eval:{task()}", 0, 3).digest == load_task(f"lm-eval:{task()}", 0, 3).digest
    assert len(load_task(f"lm-eval:{task()}", 0, 3).items) == 3


@pytest.mark.parametrize(
    ("keys", "needles", "code"),
    [
        ({"output_type": "generate_until"}, ["letters has generate_until"], 2),
        (
            {"doc_to_target": "{{ 7 if '1' in question else 0 }}"},
            ["item 1: its right answer is 7", "one right option"],
            2,
        ),
        ({"doc_to_choice": "{{ nonsense }"}, ["could not be loaded", "mend its YAML"], 2),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, ["could not be loaded"], 4),
    ],
)
def test_tasks_that_cannot_be_asked(
    task: Callable[..., Path],
    baby: Callable[..., Path],
    onecard: Run,
    refused: Callable[..., str],
    keys: dict[str, Any],
    needles: list[str],
    code: int,
) -> None:
    result = onecard("flips", baby("qwen3"), baby("qwen3"), "--tasks", f"lm-eval:{task(**keys)}")
    refused(result, *needles, code=code)


@pytest.mark.parametrize(("name", "needle"), [("no_such_task", "no task 'no_such_task'"), ("nowhere.yaml", "no file")])
def test_names_of_no_task(
    task: Callable[..., Path],
    baby: Callable[..., Path],
    onecard: Run,
    refused: Callable[..., str],
    name: str,
    needle: str,
) -> None:
    task()
    refused(onecard("flips", baby("qwen3"), baby("qwen3"), "--tasks", f"lm-eval:{name}"), needle)


def test_a_twin_warns_where_the_checkpoint_has_another_template(
    baby: Callable[..., Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    from onecard.eval import lm_eval_model as twin_lm

    model = Path(shutil.copytree(baby("qwen3"), tmp_path / "model"))
    twin_lm.open_twin(str(baby("qwen3")), str(model), device_name="cpu")
    assert not [w for w in recwarn if "otherwise" in str(w.message)]
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.warns(UserWarning, match="encodes 1 text otherwise than the original"):
        twin_lm.open_twin(str(baby("qwen3")), str(model), device_name="cpu")
