"""`real.py run`: one method or one other tool on the real model, and its KL by kind of text.

Ours quantizes the mixture. Other tools quantize the dense form, in their own environments, through the drivers of
benchmarks/peers. In both every linear weight of the blocks becomes int4. One judge reads both as mixtures.

    build/real/jobs/NAME       what the job read and wrote; weights as read back are removed once they are judged
    build/real/results-ROLE.json
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import judge
import run as peers
from field import PEERS, Peer, own
from safetensors.torch import save_file
from table import table

from onecard.checkpoint.source import Folder, open_folder

from . import documents, judging, made, mixture

# 576, the hidden size, is no multiple of 128.
GROUPS = (64, 32)


@dataclass(frozen=True)
class Job:
    """`changed`: values of the recipe that differ from the method's; `texts`: a key of documents.MIXTURES."""

    peer: Peer
    group: int
    changed: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    texts: str = "home"

    @property
    def ours(self) -> bool:
        return self.peer.environment == "onecard"

    @property
    def form(self) -> str:
        return "mixture" if self.ours else "dense"

    @property
    def name(self) -> str:
        parts = [f"{self.peer.name}-g{self.group}"]
        if self.changed:
            parts.append(hashlib.sha256(json.dumps(self.changed, sort_keys=True).encode()).hexdigest()[:8])
        parts += [f"{self.rows}-rows"] if self.rows else []
        return "-".join([*parts, *([self.texts] if self.texts != "home" else [])])

    def tool(self) -> Peer:
        """The peer with this job's options."""
        return replace(self.peer, options=self.peer.options | self.changed)


def job_of(
    method: str | None,
    peer: str | None,
    group: int,
    changed: dict[str, Any],
    rows: int | None = None,
    texts: str = "home",
) -> Job:
    if method is not None:
        return Job(own(method), group, changed, rows, texts)
    known = {item.name: item for item in PEERS if item.environment != "onecard"}
    if peer not in known:
        raise ValueError(f"no such peer: {peer}; known: {', '.join(known)}")
    return Job(known[peer], group, changed, rows, texts)


def carried_out(job: Job, build: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The job's facts, sizes and KL; with `error` if it failed. A job that is finished is only judged."""
    folder, model, of_form = (
        build / "jobs" / job.name,
        build / "model" / job.form,
        made.inputs_of(build, job.form, job.texts),
    )
    facts = made.make_inputs(build, job.form, job.texts)
    role = "choice" if given.choice else "test"
    head = {
        "name": job.name,
        "peer": job.peer.name,
        "group": job.group,
        "set": role,
        "changed": job.changed,
        "texts": job.texts,
    }
    found = head | peers.quantized(job.tool(), model, of_form, facts, job.group, folder, given.peers.resolve(), given)
    if "error" in found:
        return found
    if not (folder / "dense").exists():
        read = peers.phase("dense", job.tool(), folder, given.peers.resolve(), given)
        if read.code:
            return found | {"error": f"reading back: {peers.last_words(folder, 'dense', read.code)}"}
    found |= peers.sizes(folder / "checkpoint", facts, of_form / "canonical")
    source, dense = open_folder(of_form / "canonical"), open_folder(folder / "dense")
    found["weights"] = judge.check_weights(
        source, dense, facts["weights"], facts["experts"], job.group, job.peer.rescales
    )
    with as_mixture(dense, job.form) as quantized:
        rows = made.evaluation_rows(build, role, given.every)
        found["kl"] = judging.kl_by_kind(build / "model" / "mixture", quantized, rows, build / "reference")
    shutil.rmtree(folder / "dense")
    return found


@contextmanager
def as_mixture(weights: Folder, form: str) -> Iterator[Folder]:
    """A form's weights as the mixture's."""
    if form == "mixture":
        yield weights
        return
    with tempfile.TemporaryDirectory(prefix="real-") as name:
        path = Path(name) / "model.safetensors"
        save_file(mixture.mixture_tensors({name: weights.get(name) for name in weights.names}), path)
        yield open_folder(Path(name))


def keep(path: Path, found: dict[str, Any]) -> None:
    """Put a result in place of an older one of the same job."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [row for row in rows if row["name"] != found["name"]] + [found]
    path.write_text(json.dumps(sorted(rows, key=lambda row: (-row["group"], row["name"])), indent=1))


def markdown(results: list[dict[str, Any]]) -> str:
    """A table of all results: mean KL with its interval, by kind."""
    kinds = (judging.HOME, *documents.AWAY)
    head = ("job", "group", *kinds, "same top-1, home", "stored bytes", "CPU seconds")
    body = []
    for row in results:
        given = row["changed"] | ({"texts": row["texts"]} if row.get("texts", "home") != "home" else {})
        cells = [row["peer"] + "".join(f" {key}={value}" for key, value in given.items()), str(row["group"])]
        if "error" in row:
            cells += [row["error"].replace("|", "/")[:200], *[""] * (len(head) - 3)]
        else:
            cells += [_kl(row["kl"][kind]) for kind in kinds]
            cells += [
                f"{row['kl'][judging.HOME]['same_top1']:.2%}",
                f"{row['stored_bytes']:,}",
                f"{row['cpu_seconds']:.0f}",
            ]
        body.append(cells)
    return table(head, body)


def _kl(bucket: dict[str, Any]) -> str:
    low, high = bucket["kl_low_nats"], bucket["kl_high_nats"]
    return f"{bucket['kl_mean_nats']:.4f} ({low:.4f} to {high:.4f})"
