"""A chat template never loses a message without a word, and its clock stands still.

The templates here are small ones in the manner of published models.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from command_line import Refuse
from documents import parquet
from inputs import write_jsonl
from onecard.calibration.documents import Document, document_of
from onecard.calibration.tokens import Encoder
from onecard.models.families import load_adapter
from runs import FAMILY, Run, contents, days_later, differences

# Every role gets a header; tools' answers are written as JSON; texts are trimmed.
LLAMA4 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'tool' %}{{ m.content | tojson }}"
    "{% elif m.content is string %}{{ m.content | trim }}"
    "{% else %}{% for p in m.content %}{{ '<|image|>' if p.type == 'image' else p.text | trim }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|eot|>{% endfor %}"
)
# Unknown roles vanish; reasoning before </think> is dropped from earlier turns.
QWEN3 = (
    "{% for m in messages %}{% if m.role in ('user', 'system') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') if '</think>' in m.content else m.content %}"
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ said }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}({{ c.function.arguments }}){% endfor %}"
    "<|im_end|>{% elif m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% endif %}{% endfor %}"
)
# The system's words go into the user's first turn; other roles are refused; calls of tools are not known.
MIXTRAL = (
    "{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}[INST] {{ s ~ '\n\n' if loop.first and s }}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# All system words come first; calls of tools are written only where there is no content.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|eos|>"
    "{% elif m.role == 'tool' %}<|tool|>{{ m.content }}{% endif %}{% endfor %}"
)
# Calls are written where the content is null, their arguments as text; the words as strings, or the row is refused.
DEEPSEEK_V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}"
    "{{ '<|call|>' + c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    "{% elif m.role == 'assistant' and m.content is not none %}{{ '<|Assistant|>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<|tool|>' + m.content }}{% endif %}{% endfor %}"
)
# Whatever the content is, it is written; arguments as Python writes them.
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments }}{% endfor %}{% endfor %}"
)
TEMPLATES = {"llama4": LLAMA4, "qwen3": QWEN3, "mixtral": MIXTRAL, "deepseek": DEEPSEEK}
CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


@pytest.fixture
def encoder(baby: Callable[..., Path]) -> Encoder:
    return Encoder(baby(FAMILY), load_adapter(baby(FAMILY)), datetime.date(2026, 2, 3))


def encode(encoder: Encoder, template: str, messages: list[dict[str, Any]]) -> str:
    encoder.tokenizer.chat_template = template
    row = encoder.encode(document_of({"messages": messages}, "row-7", None))
    return str(encoder.tokenizer.decode(row.tokens))


SOUND = {
    "plain": [say("system", "be brief"), say("user", "a"), say("assistant", "a"), say("user", "a")],
    "white space": [say("user", "  two\n\n lines \n"), say("assistant", "\tyes ")],
    "earlier reasoning": [
        say("user", "why?"),
        say("assistant", "<think>hm</think>\n\nbecause"),
        say("user", "so?"),
        say("assistant", "so.", reasoning_content="hm"),
    ],
    "an empty turn": [say("user", "why?"), say("assistant", "")],
}


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_do_with_words_is_no_loss(encoder: Encoder, name: str, kind: str) -> None:
    """They trim, they drop earlier reasoning, they gather the system's words."""
    assert len(encode(encoder, TEMPLATES[name], SOUND[kind])) > 5


@pytest.mark.parametrize("name", ["llama4", "qwen3", "deepseek"])
def test_tools_are_written_by_the_templates_that_know_them(encoder: Encoder, name: str) -> None:
    """A tool's answer may be spelled as JSON, with its quotes and line ends escaped."""
    asked = [say("user", "warm?"), say("assistant", None, tool_calls=[CALL]), say("tool", '{"a": "\n"}')]
    assert "weather" in encode(encoder, TEMPLATES[name], asked)


LOST = {
    "an unknown role": ("qwen3", [say("user", "a wizard said a word"), say("wizard", "a")], "message 2 (wizard)"),
    "texts": ("{% for m in messages %}{{ m.role }}{% endfor %}", [say("user", "hi")], "1 (user)"),
    "calls": ("mixtral", [say("user", "warm?"), say("assistant", None, tool_calls=[CALL])], "message 2 (assistant)"),
    "words beside calls": (
        "deepseek",
        [say("user", "warm?"), say("assistant", "I ask", tool_calls=[CALL])],
        "message 2 (assistant)",
    ),
    "words beside a call that is named twice": (
        "{{ bos_token }}{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }} "
        "{{ c.function.name }}{% endfor %}{{ m.content if not m.tool_calls }}{% endfor %}",
        [say("user", "warm?"), say("assistant", "I ask", tool_calls=[CALL])],
        "message 2 (assistant)",
    ),
    "nothing but reasoning": (
        "deepseek",
        [say("user", "why?"), say("assistant", None, reasoning_content="hm")],
        "message 2 (assistant)",
    ),
    "several": ("deepseek", [say("critic", "x"), say("user", "x"), say("judge", "x")], "1 (critic), 3 (judge)"),
    "a role that raises": ("mixtral", [say("critic", "x")], "only user and assistant"),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_lost_message_is_named(encoder: Encoder, kind: str) -> None:
    """Also where its words stand elsewhere in what is written."""
    name, messages, needle = LOST[kind]
    encoder.tokenizer.chat_template = TEMPLATES.get(name, name)
    rows = [document_of({"messages": messages}, "row-7", None), Document("row-8", "text", "a text", None)]
    with pytest.raises(Exception, match="row-7") as caught:
        encoder.encode_all(rows)
    assert needle in str(caught.value)
    borrowed = [dataclasses.replace(row, borrowed=True) for row in rows]
    left, (reason,) = encoder.encode_usable(borrowed)
    assert [row.document for row in left] == ["row-8"]
    assert reason.startswith("row-7 ")
    assert needle in reason


CITY = {"city": "Bern"}


def words(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def calls(arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]


@pytest.mark.parametrize("content", [None, ""], ids=["null", "empty"])
@pytest.mark.parametrize("arguments", [CITY, json.dumps(CITY)], ids=["object", "JSON"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA4, '<s><|user|>warm?<|eot|><|assistant|>{"name": "weather", "arguments": {"city": "Bern"}}<|eot|>'),
        (DEEPSEEK_V3, '<s><|User|>warm?<|call|>weather {"city": "Bern"}'),
        (CHATML, '<|user|>warm?<|assistant|><call>weather {"city": "Bern"}'),
    ],
    ids=["llama4", "deepseek-v3", "chatml"],
)
def test_a_call_is_written_as_its_template_wants_it(
    encoder: Encoder, template: str, expected: str, content: Any, arguments: Any
) -> None:
    """Whatever spelling the row has: null or "" beside the call, arguments as an object or as JSON."""
    encoder.tokenizer.chat_template = template
    row = {"messages": [say("user", "warm?"), say("assistant", content, tool_calls=calls(arguments))]}
    assert encoder.template.write(document_of(row, "x", None).messages or []) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA4, '<s><|user|>one\ntwo<|eot|><|tool|>"three"<|eot|>'),
        (DEEPSEEK_V3, "<s><|User|>one\ntwo<|tool|>three"),
        (CHATML, "<|user|>one\ntwo<|tool|>three"),
    ],
    ids=["llama4", "deepseek-v3", "chatml"],
)
def test_no_list_of_texts_is_written_as_code(encoder: Encoder, template: str, expected: str) -> None:
    """Templates that read parts get them; the others get one string, a line a text. Documents do not change."""
    encoder.tokenizer.chat_template = template
    document = document_of({"messages": [say("user", words("one", "two")), say("tool", words("three"))]}, "x", None)
    assert encoder.template.write(document.messages or []) == expected
    assert (document.messages or [])[0]["content"] == words("one", "two")


def test_a_list_with_a_picture_that_would_be_written_as_code_is_refused(encoder: Encoder) -> None:
    encoder.tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=r"parts .* in message 2 \(user\) that the chat template writes as program"):
        encoder.template.write([say("assistant", "?"), say("user", [*words("see"), {"type": "image", "data": "aa=="}])])


def test_forty_conversations_of_humans_are_read_and_those_of_wizards_refused(
    copied: Callable[..., Path],
    refuse: Refuse,
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
) -> None:
    model = copied()
    (model / "chat_template.jinja").write_text("{{ bos_token }}" + QWEN3)

    def talks(name: str, *roles: str) -> Path:
        rows = [{"messages": [say(role, f"words number {n}") for role in roles]} for n in range(40)]
        return jsonl(name, rows)

    said = ["--recipe", recipe(), "--calibration", talks("humans.jsonl", "human", "GPT")]
    shown = onecard("calibration", "show", model, *said)
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["tokens_given"] > 40 * 2 * len("words number")
    wizards = talks("wizards.jsonl", "wizard")
    refuse(model, "wizards:1 ", "wizards:20 ", "20 more", "wizard", arguments=["--calibration", wizards])


def test_a_lost_message_in_a_folder_is_told_as_in_its_file(
    copied: Callable[..., Path],
    refuse: Refuse,
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """JSONL is the user's own wherever it lies. Of Parquet beside it rows are left out, and the first one is named."""
    model = copied()
    (model / "chat_template.jinja").write_text("{{ bos_token }}" + QWEN3)
    rows = [{"messages": [say("user", f"words number {n}")]} for n in range(40)]
    folder = tmp_path / "texts"
    folder.mkdir()
    parquet(folder / "public.parquet", rows + [{"messages": [say("wizard", f"spell {n}")]} for n in range(9)])
    write_jsonl(folder / "own.jsonl", rows)
    said = ["--recipe", recipe(), "--calibration", folder]
    shown = onecard("calibration", "show", model, *said)
    assert shown.exit_code == 0, shown.stderr
    told = " ".join((shown.stdout + shown.stderr).split())
    assert "9 calibration rows of texts cannot be used and are left out (public:40 loses message 1 (wizard)" in told
    write_jsonl(folder / "own.jsonl", [*rows, {"messages": [say("wizard", "x")]}])
    refuse(model, "own:41 loses message 1 (wizard)", arguments=["--calibration", folder])


def test_a_rendered_text_has_one_bos(encoder: Encoder) -> None:
    for text in ("<s>hello", "hello"):
        row = encoder.encode(Document("x", "text", text, None))
        assert str(encoder.tokenizer.decode(row.tokens)) == "<s>hello"
    assert encoder.encode(Document("x", "text", "<s>", None)).tokens.tolist() == [encoder.tokenizer.bos_token_id]


# --- the date

DATED = "{{ bos_token }}" + "{{ strftime_now('%d %b %Y %H:%M') }}" + QWEN3


def test_the_clock_of_a_template_stands_still(encoder: Encoder) -> None:
    assert encoder.template.date is None
    assert encode(encoder, DATED, SOUND["plain"]).startswith("<s>03 Feb 2026 00:00")
    assert encoder.template.date == datetime.date(2026, 2, 3)
    first = Encoder(encoder.folder, encoder.adapter, datetime.date.min)
    assert "01 Jan" in encode(first, DATED, SOUND["plain"])
    today = Encoder(encoder.folder, encoder.adapter)
    assert encode(today, DATED, SOUND["plain"]).startswith(f"<s>{datetime.date.today():%d %b %Y}")


@pytest.fixture
def dated(run: Run, copied: Callable[..., Path]) -> Run:
    """A run on a model whose template asks for the date."""
    run.model = copied(FAMILY)
    # Short, as the rows are: a row that ends within the template's own words is another's beginning.
    short = "{{ bos_token ~ strftime_now('%y%j') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (run.model / "chat_template.jinja").write_text(short)
    return run


def test_a_resumed_run_goes_on_in_the_day_of_its_beginning(
    dated: Run, onecard: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days later the resume ends in the same bytes, and a verification has the same rows. A new run has others."""
    began = datetime.date.today().isoformat()
    plain = dated.out.with_name("plain")
    assert dated(out=plain).exit_code == 0
    dated.stopped_at(2, committed=True)
    days_later(monkeypatch, 9)
    assert not differences(dated.resumed(), contents(plain))
    assert dated("--resume").exit_code == 0
    record = json.loads((dated.out / "onecard.json").read_text())
    assert record["template_date"] == began
    assert record["identity"]["evaluation rows"] == record["texts"]["evaluation"]["rows_digest"]
    rows = {}
    for name, date in {"own": [], "told": ["--date", began], "other": ["--date", "2020-01-01"]}.items():
        file = dated.out.with_name(f"{name}.json")
        done = onecard(
            "verify", dated.model, dated.out, "--recipe", dated.recipe, *dated.texts[2:], "--record", file, *date
        )
        assert done.exit_code == 0, done.stderr
        rows[name] = json.loads(file.read_text())["texts"]["evaluation"]["rows_digest"]
    assert rows["own"] == rows["told"] == record["texts"]["evaluation"]["rows_digest"]
    assert rows["other"] != rows["own"]
    refused = onecard("gate", dated.out.with_name("other.json"), "--baseline", dated.out)
    assert refused.exit_code == 2
    assert f"2020-01-01, and the baseline's is {began}" in refused.stderr
