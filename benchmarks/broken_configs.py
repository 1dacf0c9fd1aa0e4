"""Break the judge: change one field after another in config.json of a finished checkpoint, and see if `verify` sees
each that changes transformers' logits.

    python benchmarks/broken_configs.py [--families scout qwen3 deepseek mixtral]

Each family's baby (tests/babies.py) is quantized by round-to-nearest; only config.json of the result is edited, by the
values of tests/config_edits.py. transformers loads both folders whole. It is the judge: a field changes the model when
transformers fails with it, or gives other logits on the evaluation rows. `verify` has seen it when it refuses the
checkpoint and names the reason, or lists the field and measures another KL. The table goes into
docs/results/broken_configs.json; `python benchmarks/update_docs.py` writes it into docs/config-fields.md. Ends with 1
when a field that changes the model was not seen. A few minutes.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompressedTensorsConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from config_edits import EDITS, edited  # noqa: E402

from babies import make_baby  # noqa: E402
from documents import picture  # noqa: E402
from inputs import write_jsonl, write_recipe, write_tokenizer  # noqa: E402
from onecard.calibration.sources import read_jsonl  # noqa: E402
from onecard.calibration.tokens import Encoder  # noqa: E402
from onecard.core.errors import InputError  # noqa: E402
from onecard.core.rows import Row  # noqa: E402
from onecard.eval.verify import VerifyOptions, verify  # noqa: E402
from onecard.models.families import load_adapter  # noqa: E402
from onecard.pipeline import Options, quantize  # noqa: E402
from onecard.recipe import Recipe, load_recipe  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "broken_configs.json"
ROLES = ["expert", "shared_expert", "mlp", "attention"]


@dataclass(frozen=True)
class Line:
    """One edit. `transformers`: 'same', 'changed' or 'fails'. `kl`: as `verify` measures it, None where it refuses."""

    family: str
    field: str
    value: Any
    transformers: str
    transformers_kl: float | None
    kl: float | None
    kl_unchanged: float
    listed: bool
    refusal: str

    @property
    def seen(self) -> bool:
        return bool(self.refusal) or (self.listed and self.kl != self.kl_unchanged)

    @property
    def missed(self) -> bool:
        return self.transformers != "same" and not self.seen


@dataclass(frozen=True)
class Subject:
    """A finished checkpoint with its source, the evaluation rows, and what transformers makes of it."""

    family: str
    source: Path
    out: Path
    recipe: Recipe
    texts: Path
    rows: list[Row]

    def logits(self) -> list[torch.Tensor] | None:
        """Of the checkpoint as it is; None where transformers fails."""
        kind = AutoModelForImageTextToText if self.family == "scout" else AutoModelForCausalLM
        unpacked = CompressedTensorsConfig(dequantize=True)
        try:
            with contextlib.redirect_stderr(io.StringIO()), torch.inference_mode():
                model = kind.from_pretrained(str(self.out), dtype=torch.float32, quantization_config=unpacked).eval()
                for parameter in model.parameters():
                    parameter.data = parameter.data.float()
                return [model(**_inputs(row), use_cache=False).logits[0] for row in self.rows]
        except Exception:
            return None

    def verified(self) -> tuple[float | None, list[str], str]:
        """(KL, listed fields, refusal) of `verify`."""
        try:
            options = VerifyOptions(evaluation=self.texts)
            record = verify(str(self.source), str(self.out), self.recipe, options, quiet=True)
        except InputError as error:
            return None, [], str(error).replace(str(self.out), "CHECKPOINT")
        assert record.kl is not None
        assert record.checkpoint is not None
        return record.kl.kl_mean_nats, [d.field for d in record.checkpoint.config_differences], ""


def _inputs(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"input_ids": row.tokens[None]}
    return found if row.pixels is None else found | {"pixel_values": row.pixels}


def make_subject(family: str, folder: Path) -> Subject:
    source, out = make_baby(folder / "source", family), folder / "out"
    write_tokenizer(source)
    documents: list[dict[str, Any]] = [{"text": f"row {n} says " + "abcdefgh"[n:] * 4} for n in range(6)]
    if family == "scout":
        # Every patch has colours of its own: in a plain picture, where a patch lies would not matter.
        noise = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / "noise.png")
        content = [picture("noise.png"), {"type": "text", "text": "what do you see?"}]
        documents.append({"messages": [{"role": "user", "content": content}]})
    texts = write_jsonl(folder / "evaluation.jsonl", documents)
    settings: dict[str, Any] = {"method": "rtn", "quantize_roles": ROLES, "compute_dtype": "float32"}
    recipe = load_recipe(
        str(write_recipe(folder / "recipe.yaml", **settings, evaluation_rows=12, evaluation_row_tokens=64))
    )
    quantize(str(source), out, recipe, Options(evaluation=texts), quiet=True)
    rows = [Encoder(source, load_adapter(source)).encode(document) for document in read_jsonl(texts)]
    return Subject(family, source, out, recipe, texts, rows)


def judge(subject: Subject) -> list[Line]:
    """Every edit of the family."""
    config = subject.out / "config.json"
    right = config.read_text()
    before, (unchanged, listed, refusal) = subject.logits(), subject.verified()
    assert before is not None
    assert unchanged is not None
    assert not listed, (listed, refusal)
    lines = []
    for field, values in EDITS[subject.family].items():
        for value in values:
            config.write_text(json.dumps(edited(json.loads(right), field, value)))
            after, (kl, listed, refusal) = subject.logits(), subject.verified()
            effect, theirs = _effect(before, after)
            named = any(name == field or name.startswith(f"{field}.") for name in listed)
            lines.append(
                Line(subject.family, field, value, effect, theirs, kl, unchanged, named, refusal.partition("\n")[0])
            )
            print(f"{'MISSED ' if lines[-1].missed else ''}{subject.family} {field} {value}: {effect}", flush=True)
    config.write_text(right)
    return lines


def _effect(before: list[torch.Tensor], after: list[torch.Tensor] | None) -> tuple[str, float | None]:
    """What transformers makes of an edit, and the mean KL between its logits before and after."""
    if after is None or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return "fails", None
    if all(map(torch.equal, before, after)):
        return "same", 0.0
    pairs = [(p.double().log_softmax(-1), q.double().log_softmax(-1)) for p, q in zip(before, after, strict=True)]
    return "changed", float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=tuple(EDITS), default=tuple(EDITS))
    families = parser.parse_args().families
    lines: list[Line] = []
    for family in families:
        folder = Path(tempfile.mkdtemp(prefix="onecard-broken-"))
        try:
            lines += judge(make_subject(family, folder))
        finally:
            shutil.rmtree(folder)
    if set(families) == set(EDITS):
        RESULTS.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    missed = [line for line in lines if line.missed]
    changing = sum(line.transformers != "same" for line in lines)
    print(f"{len(lines)} edits, {changing} change or break transformers' model, {len(missed)} of them not seen")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
