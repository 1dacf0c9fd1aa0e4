"""Conversations that the model itself writes: its answers to fixed questions, sampled with a fixed seed.

Every conversation goes on until it fills a row. The same torch gives the same answers.
"""

from pathlib import Path
from typing import Any

import torch

from .documents import PIECE_TOKENS, ROLES, Text

SEED, TEMPERATURE, TOP_P = 0, 0.7, 0.95
ANSWER_TOKENS, MOST_TURNS = 160, 8
BATCH = 24
SUBJECTS = (
    *("the water cycle", "a recipe for bread", "how a bicycle stays upright", "the history of Rome", "black holes"),
    *(
        "why leaves turn red",
        "photosynthesis",
        "a good night's sleep",
        "learning to play the piano",
        "the French language",
    ),
    *("how vaccines work", "saving money", "the life of bees", "volcanoes", "Shakespeare's plays", "a walk by the sea"),
    *(
        "sorting a list in Python",
        "the Pythagorean theorem",
        "prime numbers",
        "the Great Wall of China",
        "chess openings",
    ),
    *("the rules of football", "a letter of thanks to a teacher", "a poem about winter", "the invention of printing"),
    *("how airplanes fly", "tea and coffee", "electric cars", "the planets of the solar system", "a job interview"),
    *("keeping a garden", "the human heart", "a short story about a lighthouse", "the Industrial Revolution", "whales"),
    *("how to make friends", "the immune system", "a holiday in Italy", "recycling", "the theory of evolution"),
    *("what a computer's memory does", "rainbows", "the Olympic Games", "healthy breakfasts", "jazz music"),
    *("time zones", "a dialogue between a cat and a dog", "fractions", "the Amazon rainforest", "public libraries"),
    *("how to write an essay", "earthquakes", "the Moon landing", "negative numbers", "dinosaurs", "the internet"),
    *("stars", "a birthday party", "gravity", "honest politicians", "the desert", "glass", "painting a wall", "maps"),
    *("the violin", "rivers", "supply and demand", "mountains", "memory", "ships", "camping", "democracy", "dreams"),
)
FIRST = "Tell me about {}."
AFTERWARDS = (
    "Can you give me an example?",
    "Explain it to a child of eight years.",
    "What do people often get wrong about it?",
    "Summarize what you said in three points.",
    "What should I read or do next?",
    "Ask me a question about it.",
    "Say more about the last point.",
)


def _answers(model: Any, tokenizer: Any, talks: list[list[dict[str, str]]]) -> list[str]:
    given = tokenizer.apply_chat_template(
        talks, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    with torch.inference_mode():
        out = model.generate(
            **given, max_new_tokens=ANSWER_TOKENS, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0
        )
    return [
        str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in out[:, given["input_ids"].shape[1] :]
    ]


def conversations(dense: Path) -> list[Text]:
    """One conversation a subject. The roles take subjects in turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    torch.manual_seed(SEED)
    talks: list[list[dict[str, str]]] = [[{"role": "user", "content": FIRST.format(subject)}] for subject in SUBJECTS]
    for turn in range(MOST_TURNS):
        going = [talk for talk in talks if talk[-1]["role"] == "user"]
        for start in range(0, len(going), BATCH):
            batch = going[start : start + BATCH]
            for talk, answer in zip(batch, _answers(model, tokenizer, batch), strict=True):
                talk.append({"role": "assistant", "content": answer})
                if len(tokenizer(tokenizer.apply_chat_template(talk, tokenize=False)).input_ids) < PIECE_TOKENS:
                    talk.append({"role": "user", "content": AFTERWARDS[turn % len(AFTERWARDS)]})
    return [
        Text("chat", subject, 0, ROLES[number % len(ROLES)], messages=tuple(talk))
        for number, (subject, talk) in enumerate(zip(SUBJECTS, talks, strict=True))
        if talk[-1]["role"] == "assistant"
    ]
