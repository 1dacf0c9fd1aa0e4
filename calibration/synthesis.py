"""The verb `calibration synthesize`: the bf16 model writes the answers of conversations.

What chat users meet is text in the model's own voice, so that is what their KL is measured on, and calibration on it
sees the inputs that will come. The users' turns are those of the recipe's calibration texts; each is answered in its
turn, on the answers before it. With a model that fits into memory transformers generates; otherwise, or on demand, the
blocks are walked (calibration/decode.py). Both write the same greedy tokens; sampled ones differ.

What is finished lies in OUT.unfinished, with the identity of the run, until OUT is written whole; the same command goes
on there. Noise is drawn from (seed, conversation, turn, position), so a killed run ends in the same text, but for sums
that round differently among fewer conversations.
"""

import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.text import Text

from ..checkpoint import files
from ..checkpoint.emit import side_files_digest
from ..checkpoint.loading import load_with_transformers
from ..checkpoint.model import Model, open_source
from ..checkpoint.source import refuse_nonfinite
from ..checkpoint.workdir import refuse_resumed
from ..core.device import Compute, choose_device, choose_dtype
from ..core.errors import InputError
from ..core.rates import DISK_BYTES_PER_SECOND, measure_flops
from ..core.rows import Row
from ..core.units import clock, size
from ..models.adapter import Adapter, Role
from ..models.walk import Walk
from ..recipe import Recipe
from ..report.progress import Progress
from .decode import BlockDecoder
from .documents import Document, spelled
from .texts import calibration_documents
from .tokens import Encoder

# A loaded model needs its weights and this much again for activations and the cache.
LOADED_MARGIN = 1.2
# A walk over a large model takes minutes; what is written is kept at least this often, and at every finished answer.
KEEP_SECONDS = 5.0


@dataclass(frozen=True)
class Settings:
    """What decides the text, beside the model."""

    rows: int
    max_new_tokens: int
    temperature: float
    seed: int
    turns: int


@dataclass
class Talk:
    """One conversation on its way: `messages` so far, the user's turns to come, the answer that is being written."""

    document: Document
    messages: list[dict[str, Any]]
    asked: list[dict[str, Any]]
    answers: list[str]
    running: list[int]

    @property
    def turn(self) -> int:
        return len(self.answers)

    def prompt(self) -> Document:
        """What is to be answered next: the turns so far and one more."""
        messages = list(self.messages)
        for k, question in enumerate(self.asked[: self.turn + 1]):
            messages.append(question)
            if k < self.turn:
                messages.append({"role": "assistant", "content": self.answers[k]})
        return self._document(messages)

    def finished(self) -> Document:
        pairs = zip(self.asked, self.answers, strict=False)
        said = [m for question, text in pairs for m in (question, {"role": "assistant", "content": text})]
        return self._document([*self.messages, *said])

    def _document(self, messages: list[dict[str, Any]]) -> Document:
        count = sum(part["type"] == "image" for m in messages for part in m["content"] if isinstance(part, dict))
        return replace(self.document, messages=messages, images=self.document.images[:count])


def talks_of(documents: list[Document], settings: Settings) -> list[Talk]:
    """The conversations that a user begins, in a seeded order, without their answers."""
    found = []
    for document in documents:
        messages = document.messages or []
        system = [m for m in messages[:1] if m["role"] == "system"]
        asked = [m for m in messages if m["role"] == "user"][: settings.turns]
        others = [m for m in messages[len(system) :] if m["role"] not in ("user", "assistant")]
        pictured = any(
            isinstance(m["content"], list) and any(part["type"] == "image" for part in m["content"])
            for m in messages
            if m["role"] == "assistant"
        )
        if asked and not others and not pictured:
            found.append(Talk(document, system, asked, [], []))
    random.Random(settings.seed).shuffle(found)
    return found[: settings.rows]


class Journal:
    """OUT.unfinished: the identity of the run, and what every conversation has so far."""

    def __init__(self, out: Path, identity: dict[str, str], overwrite: bool) -> None:
        self.path, self.identity = out.with_name(out.name + ".unfinished"), identity
        self.kept: dict[str, dict[str, Any]] = {}
        self._written = time.monotonic()
        if self.path.exists() and not overwrite:
            try:
                old = json.loads(self.path.read_text(encoding="utf-8"))
                self.kept = dict(old["talks"])
                refuse_resumed(dict(old["identity"]), identity, self.path)
            except (ValueError, TypeError, KeyError):
                raise InputError(f"{self.path} is damaged: start anew with --overwrite") from None

    def restore(self, talks: list[Talk]) -> None:
        for number, talk in enumerate(talks):
            kept = self.kept.get(str(number), {})
            talk.answers, talk.running = list(kept.get("answers", [])), list(kept.get("running", []))

    def keep(self, talks: list[Talk], now: bool = False) -> None:
        if now or time.monotonic() - self._written >= KEEP_SECONDS:
            told = {str(n): {"answers": t.answers, "running": t.running} for n, t in enumerate(talks)}
            files.write_json(self.path, {"identity": self.identity, "talks": told})
            self._written = time.monotonic()


def synthesize(
    model_name: str,
    out: Path,
    recipe: Recipe,
    settings: Settings,
    *,
    calibration: Path | None = None,
    device_name: str = "auto",
    block_by_block: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write OUT, a JSONL file that `--calibration` reads; returns the JSON line for scripts."""
    began = time.monotonic()
    device = choose_device(device_name)
    dtype = choose_dtype(recipe.compute_dtype, device)
    model = open_source(model_name)
    if out.suffix != ".jsonl" or out.is_dir():
        raise InputError(f"the output {out} must be a .jsonl file")
    if out.exists() and not overwrite:
        raise InputError(f"the output {out} exists: replace it with --overwrite, or name another file")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist: make it, or name another file")
    encoder = Encoder(model.path, model.adapter)
    if not encoder.tokenizer.chat_template:
        raise InputError(f"{model_name} has no chat template: it cannot answer a conversation")
    talks = talks_of(calibration_documents(model, recipe, calibration, encoder), settings)
    talks = [
        t for t in talks if len(encoder.encode(t.prompt(), ask=True).tokens) <= recipe.texts.calibration_row_tokens
    ]
    if not talks:
        raise InputError(
            "the calibration texts hold no conversation that a user begins and that fits into a row "
            f"({recipe.texts.calibration_row_tokens:,} tokens): name others in the recipe or with --calibration"
        )
    walked = block_by_block or not _fits(model, dtype, device)
    identity = {
        "model": model.folder.digest,
        "tokenizer and other files beside the weights": side_files_digest(model.path),
        "conversations": hashlib.sha256("".join(t.prompt().digest for t in talks).encode()).hexdigest(),
        "settings": json.dumps(vars(settings)),
        "written": f"{'block by block' if walked else 'loaded'}, {str(dtype).removeprefix('torch.')}, {device.type}",
    }
    journal = Journal(out, identity, overwrite)
    journal.restore(talks)
    with Progress(f"onecard calibration synthesize {model_name}", model.adapter.n_blocks, console, quiet) as progress:
        if console is not None and not quiet:
            console.print(Text(_cost(model, talks, settings, walked, encoder, device, dtype)), soft_wrap=True)
        progress.begin("check weights")
        refuse_nonfinite(model.folder, model.name)
        try:
            if walked:
                compute = Compute(device=device, dtype=dtype, batch_tokens=recipe.batch_tokens)
                walk = Walk.over(model.adapter, model.source, compute, progress)
                _walked(model, recipe, encoder, talks, settings, journal, walk)
            else:
                _loaded(model, recipe, encoder, talks, settings, journal, device, dtype, progress)
        except BaseException:
            journal.keep(talks, now=True)
            raise
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    made = {"model": model.folder.digest, "settings": digest, "onecard": "synthesize"}
    rows = [spelled(talk.finished()) | {"synthesized": made} for talk in talks if any(talk.answers)]
    if not rows:
        raise InputError("the model answered nothing but its end of turn: is it a chat model?")
    files.write_bytes(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    journal.path.unlink(missing_ok=True)
    return {
        "out": str(out),
        "conversations": len(rows),
        "answers": sum(len(talk.answers) for talk in talks),
        "digest": digest,
        "block_by_block": walked,
        "seconds": round(time.monotonic() - began, 3),
    }


def _fits(model: Model, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the whole model goes into the memory that is free now; weights are stored in two bytes."""
    needed = model.folder.file_bytes * dtype.itemsize / 2 * LOADED_MARGIN
    free = int(psutil.virtual_memory().available)
    return needed < free and (device.type != "cuda" or needed < torch.cuda.mem_get_info(device)[0])


def _cost(
    model: Model,
    talks: list[Talk],
    settings: Settings,
    walked: bool,
    encoder: Encoder,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """What it will take, said before it starts: an upper bound, for answers end by themselves."""
    turns = max(len(talk.asked) for talk in talks)
    lengths = [len(encoder.encode(talk.prompt(), ask=True).tokens) + settings.max_new_tokens // 2 for talk in talks]
    begun = f"{len(talks):,} conversations, {turns} turns of up to {settings.max_new_tokens:,} tokens"
    if not walked:
        return f"{begun}; the model is loaded whole ({size(model.folder.file_bytes)})"
    reading = model.folder.file_bytes / DISK_BYTES_PER_SECOND
    computing = sum(lengths) * _flops_per_token(model.adapter) / measure_flops(device, dtype)
    passes = turns * settings.max_new_tokens
    hidden = max(lengths) * len(talks) * model.adapter.hidden_size * dtype.itemsize
    whole = clock(passes * (reading + computing))
    return (
        f"{begun}; block by block: at most {passes:,} walks over {size(model.folder.file_bytes)}, each about "
        f"{reading:,.1f} s of reading (at 1 GB/s) and {computing:,.1f} s of computing, {whole} in all; {size(hidden)} "
        "of hidden rows in memory. More conversations at once cost computing only"
    )


def _flops_per_token(adapter: Adapter) -> float:
    sites = [site for block in range(adapter.n_blocks) for site in adapter.sites(block)]
    share = {Role.EXPERT: adapter.top_k}
    return sum(2.0 * sum(s.out_features) * s.in_features * (share.get(s.role) or len(s.members)) for s in sites)


def _stops(model: Model, encoder: Encoder) -> list[int]:
    """Tokens that end an answer."""
    path = model.path / "generation_config.json"
    named: Any = None
    if path.exists():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError):
            raise InputError(f"{path} is damaged: fetch the checkpoint again") from None
    ids = named if isinstance(named, list) else [named]
    return sorted({i for i in [*ids, encoder.tokenizer.eos_token_id] if isinstance(i, int)})


def _never(model: Model) -> list[int]:
    """A placeholder of an image without the image is nothing that a model can read."""
    return [] if model.adapter.image_token_id is None else [model.adapter.image_token_id]


def _noise_seed(settings: Settings, number: int, turn: int, position: int) -> int:
    key = f"{settings.seed} {number} {turn} {position}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


def pick(logits_V: torch.Tensor, temperature: float, seed: int) -> int:
    """The likeliest token at temperature 0, else one drawn with noise of its own seed."""
    if temperature == 0:
        return int(logits_V.argmax())
    probs = torch.softmax(logits_V.double() / temperature, dim=-1)
    return int(torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(seed)))


def _rounds(talks: list[Talk], encoder: Encoder, limit: int) -> Iterator[list[tuple[int, Row]]]:
    """Turn after turn, the conversations (by number) that have one to be answered, with their prompts. One whose
    history has outgrown a row ends there."""
    for turn in range(max(len(talk.asked) for talk in talks)):
        due = [n for n, talk in enumerate(talks) if talk.turn == turn < len(talk.asked)]
        prompts = [(n, encoder.encode(talks[n].prompt(), ask=True)) for n in due]
        yield [(n, row) for n, row in prompts if len(row.tokens) <= limit]


def _walked(
    model: Model,
    recipe: Recipe,
    encoder: Encoder,
    talks: list[Talk],
    settings: Settings,
    journal: Journal,
    walk: Walk,
) -> None:
    stops = set(_stops(model, encoder))
    for prompts in _rounds(talks, encoder, recipe.texts.calibration_row_tokens):
        if not prompts:
            continue
        decoder = BlockDecoder(walk, [row for _, row in prompts])
        for place, (number, _) in enumerate(prompts):
            decoder.tokens[place] += talks[number].running
        open_ = list(range(len(prompts)))
        while open_:
            logits = decoder.next_logits(open_)
            logits[:, _never(model)] = float("-inf")
            for place, logits_V in zip(list(open_), logits, strict=True):
                number = prompts[place][0]
                talk = talks[number]
                seed = _noise_seed(settings, number, talk.turn, len(talk.running))
                token = pick(logits_V, settings.temperature, seed)
                if token not in stops:
                    decoder.tokens[place].append(token)
                    talk.running.append(token)
                if token in stops or len(talk.running) >= settings.max_new_tokens:
                    _close(talk, encoder)
                    open_.remove(place)
            journal.keep(talks)


def _close(talk: Talk, encoder: Encoder) -> None:
    talk.answers.append(str(encoder.tokenizer.decode(talk.running, skip_special_tokens=True)).strip())
    talk.running = []


def _loaded(
    model: Model,
    recipe: Recipe,
    encoder: Encoder,
    talks: list[Talk],
    settings: Settings,
    journal: Journal,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    from transformers import GenerationConfig

    progress.begin("load")
    network = load_with_transformers(model.path, dtype).to(device)
    stops = _stops(model, encoder)
    drawn: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        drawn = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    # Its own would bring penalties and cuts that the walk does not know.
    network.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=(stops or [0])[0],
        suppress_tokens=_never(model) or None,
        **drawn,
    )
    progress.begin("write")
    for prompts in _rounds(talks, encoder, recipe.texts.calibration_row_tokens):
        for number, row in prompts:
            ids = row.tokens[None].to(device)
            inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if row.pixels is not None:
                inputs["pixel_values"] = row.pixels.to(device, network.dtype)
            torch.manual_seed(_noise_seed(settings, number, talks[number].turn, 0))
            with torch.inference_mode():
                written = network.generate(**inputs)[0, len(row.tokens) :].tolist()
            talks[number].running = [token for token in written if token not in stops]
            _close(talks[number], encoder)
            progress.advance(len(written))
            journal.keep(talks)
