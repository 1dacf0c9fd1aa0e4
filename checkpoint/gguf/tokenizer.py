"""A byte-level BPE tokenizer.json as GGUF metadata: tokens, merges, their types, special tokens, chat template.

llama.cpp has its own rules for splitting text before merging, each with a name (`tokenizer.ggml.pre`). The name is
looked up by the expression in tokenizer.json. A digest of tokenized text, which llama.cpp's converter uses, would not
recognise a new vocabulary with a known split. An unknown split gets GPT-2's rule and a warning that tokens may differ.

The tokenizer runs only once, on one letter, to see whether it adds a token before or after it. Tokenizers other than
byte-level BPE (SentencePiece, WordPiece, words) are refused.

Source: llama.cpp `src/llama-vocab.cpp`, `conversion/base.py` (get_vocab_base); the gguf package's Keys and TokenType.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

Value = bool | int | float | str | list[str] | list[int]
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# The expressions of tokenizer.json (GPT-4o and Llama 4 share one). SPLITS has llama.cpp's names, without and with
# `ignore_merges`: Llama 3's tokenizer takes whole words from its vocabulary before it merges; the same split without
# that is Smaug's.
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {LLAMA3: ("smaug-bpe", "llama-bpe"), QWEN2: ("qwen2", "qwen2"), LLAMA4: ("llama4", "llama4")}
GPT2 = "gpt-2"


@dataclass
class TokenizerMetadata:
    """A tokenizer as GGUF metadata."""

    # Keys without their prefix `tokenizer.`.
    metadata: dict[str, Value] = field(default_factory=dict)
    # Reasons to write no file.
    problems: list[str] = field(default_factory=list)
    # For the user of the file.
    warnings: list[str] = field(default_factory=list)


def describe(folder: Path, vocab_size: int, eos_ids: list[int]) -> TokenizerMetadata:
    """The tokenizer in `folder`, for a model with `vocab_size` rows of embeddings and the stop tokens `eos_ids`."""
    result = TokenizerMetadata()
    raw: Any
    try:
        raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        bpe, added = raw["model"], raw["added_tokens"]
        byte_level = (
            bpe["type"] == "BPE" and not bpe.get("byte_fallback") and "ByteLevel" in _types(raw["pre_tokenizer"])
        )
        vocab: dict[str, int] = bpe["vocab"] if byte_level else {}
        ids = sorted([*vocab.values(), *(token["id"] for token in added)])
    except FileNotFoundError:
        result.problems.append(
            f"{folder} has no tokenizer.json, from which llama.cpp's tokenizer is made: save it there "
            "with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
        return result
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        result.problems.append(f"{folder / 'tokenizer.json'} is damaged: fetch it again")
        return result
    if not byte_level or not bpe.get("merges"):
        result.problems.append(
            f"{folder / 'tokenizer.json'} is no byte-level BPE with merges: only that is written to GGUF"
        )
        return result
    if ids[-1] >= vocab_size:
        result.problems.append(f"tokenizer.json has the token {ids[-1]}, and the model {vocab_size} rows of embeddings")
        return result
    tokens, types = _tokens(vocab, added, vocab_size)
    if len(set(tokens)) < vocab_size:  # llama.cpp would fail an assertion
        twice = sorted({token for token in tokens if tokens.count(token) > 1})[:3]
        result.problems.append(f"tokenizer.json has the same token under two numbers: {', '.join(twice)}")
        return result
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    result.metadata = {
        "ggml.model": "gpt2",
        "ggml.pre": _split(raw, result.warnings),
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": merges,
    }
    if raw.get("normalizer"):
        kinds = ", ".join(_types(raw["normalizer"]))
        result.warnings.append(f"the tokenizer normalizes text ({kinds}) and llama.cpp does not: tokens may differ")
    _special(folder, tokens, eos_ids, result)
    return result


def _types(part: Any) -> list[str]:
    """The types of a pipeline's steps."""
    steps = (part or {}).get("pretokenizers") or (part or {}).get("normalizers") or [part or {}]
    return [str(step.get("type")) for step in steps]


def _tokens(vocab: dict[str, int], added: list[dict[str, Any]], vocab_size: int) -> tuple[list[str], list[int]]:
    """The token and type of every row. Rows without a token get a name that does not occur in text."""
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, number in vocab.items():
        tokens[number], types[number] = token, NORMAL
    for extra in added:
        tokens[extra["id"]] = extra["content"]
        types[extra["id"]] = CONTROL if extra.get("special") else USER_DEFINED
    return tokens, types


def _split(raw: dict[str, Any], warnings: list[str]) -> str:
    """llama.cpp's name for the rule that splits text before merging."""
    steps = raw["pre_tokenizer"].get("pretokenizers") or [raw["pre_tokenizer"]]
    expressions = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    own_rule = any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps)
    others = {step["type"] for step in steps} - {"Split", "ByteLevel"}
    if len(expressions) == 1 and expressions[0] in SPLITS and not own_rule and not others:
        return SPLITS[expressions[0]][bool(raw["model"].get("ignore_merges"))]
    if own_rule and not expressions and not others:
        return GPT2
    warnings.append(
        f"onecard knows no llama.cpp name for the way this tokenizer splits text: {GPT2!r} is written, and llama.cpp "
        "may make other tokens of a text"
    )
    return GPT2


def _special(folder: Path, tokens: list[str], eos_ids: list[int], result: TokenizerMetadata) -> None:
    """Add special tokens, whether tokens are added around a text, and the chat template."""
    config = _json(folder / "tokenizer_config.json")
    numbers = {token: number for number, token in enumerate(tokens)}

    def number(name: str) -> int | None:
        value = config.get(f"{name}_token")
        return numbers.get(value["content"] if isinstance(value, dict) else value) if value else None

    found = {name: number(name) for name in ("bos", "eos", "unk", "pad")}
    found["unknown"], found["padding"] = found.pop("unk"), found.pop("pad")
    others = [token for token in eos_ids if 0 <= token < len(tokens) and token != found["eos"]]
    if found["eos"] is None and others:
        found["eos"] = others.pop(0)
    if others:
        found["eot"] = others[0]  # llama.cpp stops at either
    result.metadata |= {f"ggml.{name}_token_id": value for name, value in found.items() if value is not None}
    around = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
    result.metadata["ggml.add_bos_token"] = len(around) > 0 and around[0] == found["bos"]
    result.metadata["ggml.add_eos_token"] = len(around) > 0 and around[-1] == found["eos"]
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    if isinstance(text, list):  # several by name
        text = next((entry["template"] for entry in text if entry.get("name") == "default"), None)
    if isinstance(text, str) and text:
        result.metadata["chat_template"] = text
    else:
        result.warnings.append("there is no chat template: llama.cpp will take one of its own")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
