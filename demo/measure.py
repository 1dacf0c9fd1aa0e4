"""Remeasures every figure of demo/README.md: `python -m onecard.demo.measure`, about a minute on one CPU core.

It reads demo/model and demo/data only, so no figure depends on the running Python. The bf16 weights are computed with
in float32. The exit status is 1 when a bar is missed; --write puts the table between the markers in README.md.
Perplexity is compared with a unigram model that is fitted to the evaluation tokens themselves, so that no unigram model
does better. An option's score is the summed log-likelihood of its tokens and of the <|eot|> after it. A caption is
right when greedy decoding writes exactly its text.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoTokenizer, Llama4ForConditionalGeneration

from . import corpus, network, pictures, questions, tokens

HERE = Path(__file__).parent
# A document is measured on its first 512 tokens.
ROW_TOKENS = 512
START, END = "<!-- figures: written by measure.py -->\n", "<!-- end of figures -->\n"
FUSED = {"gate_up_proj": [16, 128, 512], "down_proj": [16, 256, 128]}


@dataclass(frozen=True)
class Figure:
    name: str
    value: str
    bar: str = ""
    holds: bool = True


def ids(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    return torch.tensor([tokens.ids_of(tokenizer, text)])


def row_pixels(row: corpus.JsonRow, folder: Path) -> torch.Tensor | None:
    parts = [part for m in row.get("messages", []) if not isinstance(m["content"], str) for part in m["content"]]
    loaded = [torch.from_numpy(pictures.load(folder / part["path"])) for part in parts if part["type"] == "image"]
    return torch.stack(loaded) if loaded else None


def text_figures(
    model: Llama4ForConditionalGeneration, layers: list[network.OwnRowsMoe], tokenizer: Tokenizer, folder: Path
) -> list[Figure]:
    """Perplexity by kind, and the smallest share of the evaluation tokens that an expert gets."""
    nats: dict[str, list[torch.Tensor]] = {}
    targets = []
    routed_LE = torch.zeros(len(layers), 16)
    for row in corpus.read_jsonl(folder / "evaluation.jsonl"):
        x = ids(tokenizer, tokens.text_of(row))[:, :ROW_TOKENS]
        pixels = row_pixels(row, folder)
        assert pixels is None or int((x == network.CONFIG["image_token_index"]).sum()) == 4 * len(pixels)
        logits = model(input_ids=x, pixel_values=pixels).logits[0, :-1]
        nats.setdefault(row["kind"], []).append(functional.cross_entropy(logits, x[0, 1:], reduction="none"))
        if row["kind"] != "image":
            targets.append(x[0, 1:])
        for layer, shares_E in zip(layers, routed_LE, strict=True):
            shares_E += layer.logits_TE.argmax(1).bincount(minlength=16)
    share = float((routed_LE / routed_LE.sum(1, keepdim=True)).min())
    counts = torch.cat(targets).bincount().float()
    counts = counts[counts > 0] / counts.sum()
    unigram = float((-(counts * counts.log()).sum()).exp())
    text = torch.cat([piece for kind, pieces in nats.items() if kind != "image" for piece in pieces])
    perplexity = float(text.mean().exp())
    figures = [
        Figure("evaluation tokens scored", f"{text.numel():,} of text"),
        Figure("held-out perplexity, text", f"{perplexity:.2f}", f"below {unigram / 2:.0f}", perplexity < unigram / 2),
        Figure("perplexity of the best unigram model", f"{unigram:.0f}"),
    ]
    for kind, pieces in sorted(nats.items()):
        figures.append(Figure(f"held-out perplexity, {kind} rows", f"{float(torch.cat(pieces).mean().exp()):.2f}"))
    figures.append(Figure("least share of tokens of any expert", f"{share:.1%}", "1.5 %", share >= 0.015))
    return figures


def option_scores(model: Llama4ForConditionalGeneration, tokenizer: Tokenizer, row: corpus.JsonRow) -> torch.Tensor:
    """The log-likelihood of every option, its <|eot|> included."""
    start = ids(tokenizer, tokens.render(questions.messages(row, 0)[:1], generate=True)).shape[1]
    options = [ids(tokenizer, tokens.render(questions.messages(row, i)))[0] for i in range(len(row["choices"]))]
    x = torch.nn.utils.rnn.pad_sequence(options, batch_first=True)  # padding comes last: no token sees it
    likelihoods = model(input_ids=x).logits[:, :-1].log_softmax(-1).gather(2, x[:, 1:, None])[..., 0]
    return torch.stack([likelihoods[i, start - 1 : len(option) - 1].sum() for i, option in enumerate(options)])


def question_figures(model: Llama4ForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> list[Figure]:
    right: dict[str, list[bool]] = {"all": [], "taught": [], "untaught": []}
    for row in corpus.read_jsonl(folder / "questions.jsonl"):
        correct = int(option_scores(model, tokenizer, row).argmax()) == row["answer"]
        taught = questions.is_taught(row["kind"], row["id"].split("/", 1)[1])
        for group in ("all", row["kind"], "taught" if taught else "untaught"):
            right.setdefault(group, []).append(correct)
    accuracy = {group: sum(answers) / len(answers) for group, answers in right.items()}
    holds = 0.45 <= accuracy["all"] <= 0.95
    name = f"choice accuracy, {len(right['all'])} questions"
    figures = [Figure(name, f"{accuracy.pop('all'):.1%}", "45 to 95 %", holds)]
    return figures + [Figure(f"choice accuracy, {group}", f"{share:.1%}") for group, share in sorted(accuracy.items())]


def captions(
    model: Llama4ForConditionalGeneration, tokenizer: Tokenizer, rows: list[corpus.JsonRow], x_BCHW: torch.Tensor
) -> list[bool]:
    """Whether greedy decoding writes each caption. Rows with the same question are one batch."""
    right = [False] * len(rows)
    special = tokenizer.get_vocab(with_added_tokens=True)
    eot, patch = special[tokens.EOT], special["<|patch|>"]
    for question in sorted({row["question"] for row in rows}):
        places = [i for i, row in enumerate(rows) if row["question"] == question]
        prompt = tokens.render(pictures.messages(question, "")[:1], generate=True)
        x = ids(tokenizer, prompt).expand(len(places), -1)
        start = x.shape[1]
        for _ in range(16):
            logits_BV = model(input_ids=x, pixel_values=x_BCHW[places]).logits[:, -1]
            logits_BV[:, patch] = -torch.inf  # transformers refuses an image placeholder in the answer
            ended = x[:, start:].eq(eot).any(1)
            x = torch.cat([x, logits_BV.argmax(-1).where(~ended, eot)[:, None]], dim=1)
        for place, written in zip(places, x[:, start:].tolist(), strict=True):
            end = written.index(eot) if eot in written else len(written)
            right[place] = tokenizer.decode(written[:end]) == rows[place]["caption"]
    return right


def picture_figures(model: Llama4ForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> list[Figure]:
    rows = corpus.read_jsonl(folder / "pictures.jsonl")
    x_BCHW = torch.stack([torch.from_numpy(pictures.load(folder / row["path"])) for row in rows])
    seen = sum(captions(model, tokenizer, rows, x_BCHW)) / len(rows)
    blank = sum(captions(model, tokenizer, rows, torch.zeros_like(x_BCHW))) / len(rows)
    return [
        Figure(f"captions right, {len(rows)} pictures", f"{seen:.1%}", "90 %", seen >= 0.9),
        Figure("captions right, picture blanked", f"{blank:.1%}", "5 % (chance 1.1 %)", blank <= 0.05),
    ]


def shared_rows(folder: Path) -> int:
    """How many calibration rows have the digest of an evaluation row."""
    first, second = (
        {corpus.digest(row, folder) for row in corpus.read_jsonl(folder / f"{split}.jsonl")}
        for split in ("calibration", "evaluation")
    )
    return len(first & second)


def file_figures(model_folder: Path, tokenizer: Tokenizer, folder: Path) -> list[Figure]:
    """Sizes, shapes and names, the rows of the data, and whether the chat template writes what tokens.render does."""
    path = model_folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    prefix = "language_model.model.layers.{}.feed_forward.experts.{}"
    fused = all(shapes.get(prefix.format(n, end)) == shape for n in range(4) for end, shape in FUSED.items())
    parameters = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
    figures = [
        Figure("parameters", f"{parameters:,}"),
        Figure("bytes of model.safetensors", f"{path.stat().st_size:,}", "16,000,000", path.stat().st_size <= 16e6),
        Figure("all tensors bf16, experts fused", "yes" if fused else "no", "yes", fused and dtypes == {"BF16"}),
    ]
    template = AutoTokenizer.from_pretrained(model_folder)
    agree = True
    for split in ("calibration", "evaluation"):
        rows = corpus.read_jsonl(folder / f"{split}.jsonl")
        count = sum(len(tokens.ids_of(tokenizer, tokens.text_of(row))) for row in rows)
        figures.append(Figure(f"{split} rows", f"{len(rows)} with {count:,} tokens"))
        for row in rows:
            if "messages" in row:
                written = template.apply_chat_template(row["messages"], tokenize=False)
                agree &= written == tokens.render(row["messages"], image="<|image|>")
    shared = shared_rows(folder)
    return [
        *figures,
        Figure("rows in both", str(shared), "0", shared == 0),
        Figure("chat template writes what the model was trained on", "yes" if agree else "no", "yes", agree),
    ]


def twin_figure(own: Llama4ForConditionalGeneration, model_folder: Path, tokenizer: Tokenizer, folder: Path) -> Figure:
    """The largest difference between our model and transformers' own, on one row of text and one of pictures."""
    whole = Llama4ForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = corpus.read_jsonl(folder / "evaluation.jsonl")
    worst = 0.0
    for row in (rows[0], rows[-1]):
        x, pixels = ids(tokenizer, tokens.text_of(row))[:, :ROW_TOKENS], row_pixels(row, folder)
        ours, theirs = (model(input_ids=x, pixel_values=pixels).logits for model in (own, whole))
        worst = max(worst, float((ours - theirs).abs().max()))
    return Figure("largest logit difference to transformers' experts", f"{worst:.0e}", "1e-3", worst <= 1e-3)


def figures_of(model_folder: Path, folder: Path) -> list[Figure]:
    tokenizer = tokens.load(model_folder)
    model = network.load(model_folder).eval()
    layers = network.use_own_rows(model)
    with torch.inference_mode():
        return [
            *file_figures(model_folder, tokenizer, folder),
            twin_figure(model, model_folder, tokenizer, folder),
            *text_figures(model, layers, tokenizer, folder),
            *question_figures(model, tokenizer, folder),
            *picture_figures(model, tokenizer, folder),
        ]


def table(figures: list[Figure]) -> str:
    lines = ["| figure | measured | bar |", "|---|---|---|"]
    lines += [f"| {f.name} | {f.value} | {f.bar}{'' if f.holds else ' MISSED'} |" for f in figures]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m onecard.demo.measure", description="Remeasure the demo model.")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into demo/README.md")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    figures = figures_of(given.model, given.data)
    print(table(figures), end="")
    missed = [figure.name for figure in figures if not figure.holds]
    if missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
    if given.write:
        readme = HERE / "README.md"
        before, rest = readme.read_text(encoding="utf-8").split(START)
        readme.write_text(before + START + table(figures) + END + rest.split(END)[1], encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
