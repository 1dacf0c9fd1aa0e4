"""The verb `calibration synthesize`: the bf16 model writes the answers of the calibration conversations.

A chat model is measured on text in its own voice, because that is what its users read; calibration on such text sees
the inputs that will come. A model that fits into memory is loaded and transformers generates. Otherwise, or on demand,
the blocks are walked (decode.py). Both ways write the same greedy tokens; sampled ones differ.

A stopped run keeps its answers in OUT.unfinished, and the same command goes on there. Each token's noise has its own
seed, so a resumed run writes the same text, except where sums over fewer conversations round differently.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.text import Text

from ..checkpoint import files
from ..checkpoint.loading import load_with_transformers
from ..checkpoint.model import Model, open_source
from ..checkpoint.side_files import side_files_digest
from ..checkpoint.source_checks import refuse_nonfinite
from ..core.device import Compute, choose_compute
from ..core.errors import InputError
from ..core.json_text import json_text
from ..core.rates import DISK_BYTES_PER_SECOND, measure_flops
from ..core.rows import Row
from ..core.schedule import Expected, Schedule
from ..core.units import clock, size
from ..models.adapter import Adapter
from ..models.walk import Walk
from ..recipe import Recipe
from ..report.progress import Progress
from .conversations import (
    Conversation,
    Journal,
    SynthesisSettings,
    conversations_of,
    kept_date,
    pick,
    turns_to_answer,
)
from .decode import BlockDecoder
from .documents import spelled
from .templates import DATE
from .texts import calibration_documents
from .tokens import Encoder

# A loaded model takes this many times the bytes of its weights: activations and the cache come on top.
LOADED_MARGIN = 1.2


@dataclass(frozen=True)
class Where:
    """How the model computes. It decides no token, except by rounding."""

    device_name: str = "auto"
    # Never load the whole model. False: only if it does not fit into memory.
    block_by_block: bool = False


@dataclass(frozen=True)
class Writer:
    """A model that writes the answers of conversations."""

    model: Model
    recipe: Recipe
    encoder: Encoder
    settings: SynthesisSettings
    conversations: list[Conversation]
    compute: Compute
    # Whether the blocks are walked instead of loading the model.
    walks: bool
    # What the user is told of the texts.
    told: list[str]

    @property
    def longest(self) -> int:
        """The most tokens that a prompt may have."""
        return self.recipe.texts.calibration_row_tokens

    @property
    def never(self) -> list[int]:
        """Tokens that no answer may hold: a placeholder of an image without the image cannot be read."""
        image = self.model.adapter.image_token_id
        return [] if image is None else [image]

    def identity(self) -> dict[str, str]:
        """All that the text depends on, in words for the message that refuses to resume."""
        prompts = "".join(c.prompt().digest for c in self.conversations)
        way = "block by block" if self.walks else "loaded"
        return {
            "model": self.model.folder.digest,
            "tokenizer and other files beside the weights": side_files_digest(self.model.path),
            "conversations": hashlib.sha256(prompts.encode()).hexdigest(),
            "settings": json_text(vars(self.settings)),
            "written": f"{way}, {str(self.compute.dtype).removeprefix('torch.')}, {self.compute.device.type}",
        } | ({} if self.encoder.template.date is None else {DATE: self.encoder.template.date.isoformat()})

    def stops(self) -> list[int]:
        """Tokens that end an answer. Raises InputError for a damaged generation_config.json."""
        path = self.model.path / "generation_config.json"
        named: Any = None
        if path.exists():
            try:
                named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (ValueError, AttributeError):
                raise InputError(f"{path} is damaged: fetch the checkpoint again") from None
        ids = named if isinstance(named, list) else [named]
        return sorted({i for i in [*ids, self.encoder.tokenizer.eos_token_id] if isinstance(i, int)})

    def write(self, journal: Journal, progress: Progress) -> None:
        """Answers every conversation. Whatever happens, the journal holds all that was written."""
        try:
            for_all = self._write_walking if self.walks else self._write_loaded
            for_all(journal, progress)
        except BaseException:
            journal.keep(self.conversations, now=True)
            raise

    def _write_walking(self, journal: Journal, progress: Progress) -> None:
        walk = Walk.over(self.model.adapter, self.model.source, self.compute, progress)
        for prompts in turns_to_answer(self.conversations, self.encoder, self.longest):
            if prompts:
                self._walk_turn(walk, prompts, journal)

    def _walk_turn(self, walk: Walk, prompts: list[tuple[int, Row]], journal: Journal) -> None:
        """One turn of all conversations, a token of each in every walk over the blocks."""
        stops = set(self.stops())
        decoder = BlockDecoder(walk, [row for _, row in prompts])
        for place, (number, _) in enumerate(prompts):
            decoder.tokens[place] += self.conversations[number].running
        unanswered = list(range(len(prompts)))
        while unanswered:
            logits = decoder.next_logits(unanswered)
            logits[:, self.never] = float("-inf")
            for place, logits_V in zip(list(unanswered), logits, strict=True):
                number = prompts[place][0]
                conversation = self.conversations[number]
                seed = self.settings.noise_seed(number, conversation.turn, len(conversation.running))
                token = pick(logits_V, self.settings.temperature, seed)
                if token not in stops:
                    decoder.tokens[place].append(token)
                    conversation.running.append(token)
                if token in stops or len(conversation.running) >= self.settings.max_new_tokens:
                    conversation.close_answer(self.encoder)
                    unanswered.remove(place)
            journal.keep(self.conversations)

    def _write_loaded(self, journal: Journal, progress: Progress) -> None:
        from transformers import GenerationConfig

        device = self.compute.device
        progress.begin("load")
        network = load_with_transformers(self.model.path, self.compute.dtype).to(device)
        stops = self.stops()
        drawn: dict[str, Any] = {"do_sample": False}
        if self.settings.temperature:
            drawn = {"do_sample": True, "temperature": self.settings.temperature, "top_k": 0, "top_p": 1.0}
        # The checkpoint's own config may hold penalties and cuts that the walk does not have.
        network.generation_config = GenerationConfig(
            max_new_tokens=self.settings.max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=(stops or [0])[0],
            suppress_tokens=self.never or None,
            **drawn,
        )
        progress.begin("write")
        for prompts in turns_to_answer(self.conversations, self.encoder, self.longest):
            for number, row in prompts:
                conversation = self.conversations[number]
                ids = row.tokens[None].to(device)
                inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                if row.pixels is not None:
                    inputs["pixel_values"] = row.pixels.to(device, network.dtype)
                torch.manual_seed(self.settings.noise_seed(number, conversation.turn, 0))
                with torch.inference_mode():
                    written = network.generate(**inputs)[0, len(row.tokens) :].tolist()
                conversation.running = [token for token in written if token not in stops]
                conversation.close_answer(self.encoder)
                progress.advance(len(written))
                journal.keep(self.conversations)

    def schedule(self) -> Schedule:
        """What is left to write, at most: answers may end early."""
        turns = [len(c.asked) - c.turn for c in self.conversations]
        most = self.settings.max_new_tokens
        if self.walks:
            begins = max(turns) * most * self.model.adapter.n_blocks
            stage = Expected("write", "write", 1.0, ("write: walk",), begins=begins)
        else:
            stage = Expected("write", "write", 1.0, ("write",), tokens=sum(turns) * most)
        return Schedule((stage,), in_seconds=False, at_most=True)

    def cost(self) -> str:
        """What it will take, in words. An upper bound: answers may end early."""
        turns = max(len(c.asked) for c in self.conversations)
        most = self.settings.max_new_tokens
        begun = f"{len(self.conversations):,} conversations, {turns} turns of up to {most:,} tokens"
        file_bytes = self.model.folder.file_bytes
        if not self.walks:
            return f"{begun}; the model is loaded whole ({size(file_bytes)})"
        prompts = [self.encoder.encode(c.prompt(), ask=True) for c in self.conversations]
        lengths = [len(row.tokens) + most // 2 for row in prompts]
        reading = file_bytes / DISK_BYTES_PER_SECOND
        computing = (
            sum(lengths) * flops_per_token(self.model.adapter) / measure_flops(self.compute.device, self.compute.dtype)
        )
        passes = turns * most
        hidden = max(lengths) * len(prompts) * self.model.adapter.hidden_size * self.compute.dtype.itemsize
        whole = clock(passes * (reading + computing))
        return (
            f"{begun}; block by block: at most {passes:,} walks over {size(file_bytes)}, each about "
            f"{reading:,.1f} s of reading (at 1 GB/s) and {computing:,.1f} s of computing, {whole} in all; "
            f"{size(hidden)} of hidden rows in memory. More conversations at once cost computing only"
        )


def flops_per_token(adapter: Adapter) -> float:
    """Multiplications and additions of all blocks for one token, which visits its routed experts only."""
    sites = [site for block in range(adapter.n_blocks) for site in adapter.sites(block)]
    return sum(2.0 * sum(site.out_features) * site.in_features * site.entries_per_token for site in sites)


def synthesize(
    model_name: str,
    out: Path,
    recipe: Recipe,
    settings: SynthesisSettings,
    where: Where = Where(),
    *,
    calibration: Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Writes OUT, a JSONL file for `--calibration`; returns the JSON line for scripts.

    `calibration` replaces the recipe's texts. Raises InputError, ResourceError.
    """
    began = time.monotonic()
    writer = _writer(model_name, out, recipe, settings, where, calibration, overwrite)
    identity = writer.identity()
    journal = Journal(out, identity, overwrite)
    journal.restore(writer.conversations)
    model = writer.model
    with Progress(f"onecard calibration synthesize {model_name}", model.adapter.n_blocks, console) as progress:
        if console is not None:
            console.print(Text(writer.cost()), soft_wrap=True)
            for words in writer.told:
                console.print(Text(f"warning: {words}", style="yellow"), soft_wrap=True)
        progress.expect(writer.schedule())
        progress.begin("check weights")
        refuse_nonfinite(model.folder, model.name)
        writer.write(journal, progress)
    digest = hashlib.sha256(json_text(identity, sort_keys=True).encode()).hexdigest()
    made = {"model": model.folder.digest, "settings": digest, "onecard": "synthesize"}
    rows = [spelled(c.finished()) | {"synthesized": made} for c in writer.conversations if any(c.answers)]
    if not rows:
        raise InputError("the model ended every answer at once: is it a chat model?")
    files.write_bytes(
        out, "".join(json_text(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="backslashreplace")
    )
    journal.path.unlink(missing_ok=True)
    return {
        "out": str(out),
        "conversations": len(rows),
        "answers": sum(len(c.answers) for c in writer.conversations),
        "digest": digest,
        "block_by_block": writer.walks,
        "seconds": round(time.monotonic() - began, 3),
    }


def _writer(
    model_name: str,
    out: Path,
    recipe: Recipe,
    settings: SynthesisSettings,
    where: Where,
    calibration: Path | None,
    overwrite: bool,
) -> Writer:
    """Opens the model and its conversations. Raises InputError before anything is written."""
    compute = choose_compute(where.device_name, recipe.compute_dtype, recipe.batch_tokens)
    model = open_source(model_name)
    if out.suffix != ".jsonl" or out.is_dir():
        raise InputError(f"the output {out} must be a .jsonl file")
    if out.exists() and not overwrite:
        raise InputError(f"the output {out} exists: replace it with --overwrite, or name another file")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist: make it, or name another file")
    kept = None if overwrite else kept_date(out)
    encoder = Encoder(model.path, model.adapter, recipe.texts.template_date or kept)
    if not encoder.tokenizer.chat_template:
        raise InputError(f"{model_name} has no chat template: it cannot answer a conversation")
    longest = recipe.texts.calibration_row_tokens
    documents, told = calibration_documents(model, recipe, calibration, encoder)
    begun = conversations_of(documents, settings)
    conversations = [c for c in begun if len(encoder.encode(c.prompt(), ask=True).tokens) <= longest]
    if not conversations:
        raise InputError(
            "the calibration texts hold no conversation that a user begins and that fits into a row "
            f"({longest:,} tokens): name others in the recipe or with --calibration"
        )
    told.append(f"{len(conversations):,} of {len(documents):,} calibration texts are conversations to be answered")
    walks = where.block_by_block or not _fits(model, compute)
    return Writer(model, recipe, encoder, settings, conversations, compute, walks, told)


def _fits(model: Model, compute: Compute) -> bool:
    """Whether the whole model fits into the memory that is free now. Files store a weight in two bytes."""
    device = compute.device
    needed = model.folder.file_bytes * compute.dtype.itemsize / 2 * LOADED_MARGIN
    free = int(psutil.virtual_memory().available)
    return needed < free and (device.type != "cuda" or needed < torch.cuda.mem_get_info(device)[0])
