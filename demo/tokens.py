"""The demo model's tokenizer: a byte-level BPE of 1024 tokens with Llama 4's special tokens and a short chat template.

It is trained on the training split only. `render` writes a conversation exactly as the chat template does (measure.py
checks that), except that an image is expanded already, as transformers' Llama4Processor does for one tile:
`<|image_start|>`, `<|image|>`, four `<|patch|>`, `<|image_end|>`. The template writes `<|image|>`, like Llama 4's.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .corpus import JsonRow

VOCABULARY = 1024
BOS, EOS, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|finetune_right_pad|>"
SPECIAL_TOKENS = (
    BOS,
    EOS,
    "<|header_start|>",
    "<|header_end|>",
    EOT,
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    PAD,
)
# Llama 3's split. The two line breaks of a header are always one token, so the tokens of a prompt are also the first
# tokens of prompt and answer together. With GPT-2's split they are not.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IMAGE = "<|image_start|><|image|>" + "<|patch|>" * 4 + "<|image_end|>"
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""


def render(messages: list[JsonRow], generate: bool = False, image: str = IMAGE) -> str:
    """A conversation as text, with images expanded."""
    text = BOS
    for message in messages:
        parts = message["content"]
        if not isinstance(parts, str):
            parts = "".join(image if part["type"] == "image" else part["text"] for part in parts)
        text += f"<|header_start|>{message['role']}<|header_end|>\n\n{parts}{EOT}"
    return text + ("<|header_start|>assistant<|header_end|>\n\n" if generate else "")


def text_of(row: JsonRow) -> str:
    """A document row as the model reads it, special tokens included."""
    return render(row["messages"]) if "messages" in row else BOS + row["text"]


def train(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]),
        ]
    )
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert all(tokenizer.token_to_id(token) == i for i, token in enumerate(SPECIAL_TOKENS))
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Llama4Processor",
        "bos_token": BOS,
        "eos_token": EOT,
        "pad_token": PAD,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that has its special tokens already."""
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
