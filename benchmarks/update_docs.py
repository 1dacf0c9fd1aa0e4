"""Write the generated parts of the documents: `python benchmarks/update_docs.py`, or `--check` to change nothing.

A part stands between `<!-- generated: NAME -->` and `<!-- end of generated -->`, and NAME is a key of PARTS. Figures of
the comparison come from docs/results/peers.json and real.json; exact sizes from a plan of the published shapes, without
weights (tests/hollow.py); methods, recipes and rules from the code. PICTURES are drawn, too.
tests/test_documents.py fails when a document differs from what this would write.
"""

import argparse
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "peers"), str(ROOT / "tests")]

import click  # noqa: E402
import plan_svg  # noqa: E402
import plot  # noqa: E402
from rows import PeerRow, read_kept  # noqa: E402
from table import least_in_bold, markdown, table  # noqa: E402

import counted  # noqa: E402
from hollow import MAVERICK, QWEN3, SCOUT, published, write_hollow  # noqa: E402
from onecard.checkpoint.engines.table import ENGINES  # noqa: E402
from onecard.checkpoint.model import open_headers  # noqa: E402
from onecard.cli import main as onecard  # noqa: E402
from onecard.core.method import PRESETS, UNCALIBRATED  # noqa: E402
from onecard.core.shipped_recipes import recipe_names, recipe_text  # noqa: E402
from onecard.core.yaml_file import parse_yaml  # noqa: E402
from onecard.forecast import plan  # noqa: E402
from onecard.models.config_keys import COMMON, KEYS  # noqa: E402
from onecard.recipe import Recipe, load_recipe  # noqa: E402
from real_model import kept  # noqa: E402

# Pictures, and what draws them.
PICTURES: dict[str, Callable[[], str]] = {
    "docs/peers.svg": lambda: plot.svg(read_kept()),
    "docs/plan.svg": plan_svg.svg,
}
PART = re.compile(r"(<!-- generated: (?P<name>[^>]+) -->\n).*?(\n<!-- end of generated -->)", re.DOTALL)
MODELS = {"demo": "embedded", "qwen3-moe": "Qwen3-MoE"}
# The rows of README.md's table, in its order, and what they are called there.
SHOWN = {
    "onecard-best": "onecard `best`",
    "onecard-balanced": "onecard `balanced`",
    "onecard-fast": "onecard `fast`",
    "auto-round": "auto-round",
    "llmcompressor-gptq": "llm-compressor GPTQ",
    "hqq": "HQQ",
    "rtn-absmax8": "round-to-nearest, absmax / 8 (Meta's own scheme for Scout)",
    "llmcompressor-awq": "llm-compressor AWQ",
}
# Remarks on the other tool of a line in docs/benchmarks.md.
REMARKS = {"llamacpp-q4_k_m-imatrix": "llama.cpp Q4_K_M with importance matrix (5 and 6 bits too)"}
SIZED = [
    (SCOUT, "Llama 4 Scout", ("llama4-scout-h100", "llama4-scout-h100-int4-attention", "llama4-scout-h200")),
    (MAVERICK, "Llama 4 Maverick", ("llama4-scout-h100",)),
    (QWEN3, "Qwen3-30B-A3B", ("qwen3-30b-a3b-24gb",)),
]
GIB = 2**30


# --- the comparison with other tools


def found(peer: str, model: str, group: int) -> PeerRow:
    (row,) = [r for r in read_kept() if (r.peer, r.model, r.group) == (peer, model, group)]
    return row


def peers_all() -> str:
    return markdown(read_kept()).strip()


def peers_short() -> str:
    """README.md: mean KL of a few tools at groups of 128, the best in bold."""
    body = [[found(peer, model, 128).kl for model in MODELS] for peer in SHOWN]
    cells = zip(SHOWN.values(), least_in_bold(body, 5), strict=True)
    return table(("mean KL, nats", "embedded Llama 4", "Qwen3-MoE"), [[name, *figures] for name, figures in cells])


def peers_best() -> str:
    """docs/benchmarks.md: ours beside the best other tool, a line for each model and group size."""
    body = []
    for model, title in MODELS.items():
        for group, suffix in ((128, ""), (64, ""), (32, ""), (32, "-bf16-attention")):
            ours = [found(f"onecard-{method}{suffix}", model, group) for method in ("best", "balanced", "fast")]
            name = ours[0].beside.partition(" of ")[2]
            other = found(name, model, group)
            body.append(
                [
                    title,
                    f"{group}, attention bf16" if suffix else f"{group}",
                    REMARKS.get(name, name),
                    f"{other.stored_bytes:,}",
                    f"{other.kl:.5f}",
                    f"{ours[0].stored_bytes:,}",
                    *(f"{row.kl:.5f} ({row.beside.partition(' ')[0]})" for row in ours),
                ]
            )
    head = ("model", "groups of", "best other tool", "its bytes", "its mean KL", "our bytes", "`best`", "`balanced`")
    return table((*head, "`fast`"), body)


# --- sizes of published models, from their shapes


@contextmanager
def hollow(model: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield write_hollow(Path(name) / model, published(model))


@cache
def planned(model: str, recipe: str, *options: str) -> dict[str, Any]:
    """The JSON line of `onecard plan`. A recipe that names no card of its own is planned for an H100."""
    card = load_recipe(recipe).card.gpu or "h100-80gb"
    with hollow(model) as folder:
        words = ["plan", str(folder), "--recipe", recipe, "--gpu", card, "--device", "cpu", "--json", *options]
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(io.StringIO()), suppress(SystemExit):  # exit code 3: does not fit
            onecard.main(words, standalone_mode=False)
    return dict(json.loads(out.getvalue().splitlines()[-1]))


def scout() -> str:
    """README.md: Scout by the recipes for one H100."""
    plain, attention = on_an_h100()
    return table(
        ("", "bf16 source", "`llama4-scout-h100`", "`llama4-scout-h100-int4-attention`"),
        [
            ["routed and shared experts", "bf16", "int4, group 128", "int4, group 128"],
            ["attention", "bf16", "bf16", "int4, group 128"],
            ["router, norms, embeddings, head, vision tower", "bf16", "bf16", "bf16"],
            ["size (decimal GB)", *(f"{b / 1e9:.1f}" for b in (plain["source_bytes"], *emitted(plain, attention)))],
            ["longest context of one sequence", "", *(f"{plan['max_context']:,}" for plan in (plain, attention))],
            ["engine", "any", "any vLLM with Llama 4", "vLLM with pull request 35033 (2026-02-23)"],
        ],
    )


def on_an_h100() -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans of Scout with bf16 and with int4 attention, prompts read in passes of 2,048 tokens."""
    names = ("llama4-scout-h100", "llama4-scout-h100-int4-attention")
    plain, attention = (planned(SCOUT, name, "--batch-tokens", "2048") for name in names)
    return plain, attention


def emitted(*plans: dict[str, Any]) -> list[int]:
    return [int(plan["emitted_bytes"]) for plan in plans]


def sizes() -> str:
    body = []
    for model, title, recipes in SIZED:
        for n, recipe in enumerate(recipes):
            plan = planned(model, recipe, *(("--batch-tokens", "2048") if "h100" in recipe else ()))
            # Rows between blocks take what is free.
            about = f"about {(plan['estimated_ram_bytes'] - plan['rows_in_ram_bytes']) / 1e9:.0f} GB"
            first = [title, f"{plan['parameters']:,}"] if n == 0 else ["", ""]
            body.append([*first, f"`{recipe}`", f"{plan['emitted_bytes']:,}", f"{plan['bits_per_weight']:.3f}", about])
    return table(("model", "parameters", "recipe", "bytes", "bits a weight", "memory to quantize"), body)


def scout_card() -> str:
    """docs/benchmarks.md: what a plan says of Scout on its card."""
    plain, attention = on_an_h100()
    wide = planned(SCOUT, "llama4-scout-h100", "--batch-tokens", "8192")
    big, pair = planned(SCOUT, "llama4-scout-h200"), planned(SCOUT, "llama4-scout-2x48gb")
    gb = [f"{b / 1e9:.2f}" for b in (plain["source_bytes"], *emitted(plain, attention))]
    short = f"{-wide['left_bytes'] / GIB:.1f} GiB short"
    left = f"{plain['left_bytes'] / GIB:.2f} GiB; at most {plain['max_context']:,} tokens"
    per_token, per_sequence = plain["kv_per_token_bytes"] // 1024, plain["kv_per_sequence_bytes"] / GIB
    return table(
        ("what", "bytes or tokens"),
        [
            ["weights: bf16; experts int4 group 128; attention too", f"{', '.join(gb)} GB"],
            ["cache in bf16", f"{per_token} KiB a token and up to {per_sequence:.3f} GiB a sequence"],
            ["`llama4-scout-h100`, 131,072 tokens, passes of 2,048 tokens: left of 0.9 of an H100", left],
            ["the same with passes of 8,192, vLLM's default", short],
            ["`llama4-scout-h200` on an H200, 131,072 tokens: left", f"{big['left_bytes'] / GIB:.2f} GiB"],
            ["`llama4-scout-2x48gb` on two L40S, 131,072 tokens: left on each", f"{pair['left_bytes'] / GIB:.2f} GiB"],
        ],
    )


def scout_time() -> str:
    """README.md: what a plan says that each method takes on an H100 that is assumed."""
    body = []
    for method in ("rtn", "fast", "balanced", "best"):
        with hollow(SCOUT) as folder, redirect_stderr(io.StringIO()):
            cost = plan(str(folder), with_method("llama4-scout-h100", method), assume="h100-80gb").cost
        sizes = [f"{nbytes / 1e9:.0f} GB" for nbytes in (cost.device_bytes, cost.ram_bytes, cost.disk_bytes)]
        body.append([f"`{method}`", f"{cost.seconds / 60:.0f} min", *sizes])
    return table(("method", "time", "card", "RAM", "disk"), body)


def with_method(recipe: str, method: str) -> Recipe:
    """A shipped recipe with another method, whose presets count."""
    given = parse_yaml(recipe, recipe_text(recipe), "")
    return Recipe.model_validate(given | {"method": method})


# --- what the code says of itself


def recipes() -> str:
    return table(("name", "what"), [[f"`{name}`", load_recipe(name).description] for name in recipe_names()])


def methods() -> str:
    """The keys that methods set, and the value that each method gives them."""
    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
    plain = Recipe.model_validate({"name": "plain", "description": "", "method": "rtn"}).model_dump()

    def cell(method: str, key: str) -> str:
        unused = method in UNCALIBRATED and key not in ("format", "bits", "group_size")
        value = PRESETS[method].get(key, plain[key])
        return "" if unused else f"{value:g}" if isinstance(value, float) else str(value)

    body = [[f"`{key}`", *(cell(method, key) for method in PRESETS)] for key in keys]
    return table(("key", *(f"`{method}`" for method in PRESETS)), body)


def verbs() -> str:
    """docs/cli.md: what --help says of every verb."""
    return "\n\n".join(f"### {name}\n\n{help_of(name, command)}" for name, command in commands_of(onecard, "onecard"))


def commands_of(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command with its words, those of groups too."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands_of(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def help_of(name: str, command: click.Command) -> str:
    shown = command.get_help(
        command.make_context(name, [], resilient_parsing=True, terminal_width=100, max_content_width=100)
    )
    return "\n".join(f"    {line}".rstrip() for line in shown.splitlines() if "--help" not in line)


def rules(engine: str) -> str:
    held = ENGINES[engine]
    body = [[f"`{rule.name}`", rule.severity, rule.way_out, rule.source] for rule in held]
    return table(("rule", "breach is", "what to do about it", "source"), body)


def config_keys() -> str:
    """docs/config-fields.md: the groups of keys, a line for each key of each config class."""
    body = [
        [f"`{kind}`", f"`{name}`", key.use.value, key.does]
        for kind, keys in KEYS.items()
        for name, key in sorted(keys.items())
        if name not in COMMON
    ]
    common = [["every class", f"`{name}`", key.use.value, key.does] for name, key in sorted(COMMON.items())]
    return table(("config class", "key", "use", "what it sets"), [*common, *body])


def broken_configs() -> str:
    """docs/config-fields.md: every edit of a finished checkpoint's config.json that changes transformers' model or that
    `verify` refuses."""
    lines = json.loads((ROOT / "docs" / "results" / "broken_configs.json").read_text(encoding="utf-8"))
    body = []
    for line in lines:
        if line["transformers"] == "same" and not line["refusal"]:
            continue
        theirs = "fails" if line["transformers"] == "fails" else f"{line['transformers_kl']:.2g}"
        found = f"KL {line['kl_unchanged']:.5f} -> {line['kl']:.5f}, listed" if line["listed"] else "refused"
        value = json.dumps(line["value"])
        body.append([line["family"], f"`{line['field']}`", f"`{value}`", theirs, found])
    head = ("baby", "field", "its new value", "transformers: KL to the unchanged checkpoint", "`verify`")
    return table(head, body)


def unchanged_configs() -> str:
    """docs/config-fields.md: how many edits there were, and what became of them."""
    lines = json.loads((ROOT / "docs" / "results" / "broken_configs.json").read_text(encoding="utf-8"))
    changing = [line for line in lines if line["transformers"] != "same"]
    seen = [line for line in changing if line["refusal"] or (line["listed"] and line["kl"] != line["kl_unchanged"])]
    return (
        f"Of {len(lines)} edits, {len(changing)} change transformers' model or break it. `verify` sees {len(seen)} of "
        f"them: it refuses {sum(bool(line['refusal']) for line in seen)} and measures and lists the rest."
    )


def gpu_cost() -> str:
    """What gpu_cost.py --write has counted."""
    held = json.loads((HERE / "gpu_cost.json").read_text(encoding="utf-8"))
    lines = [
        "| model | method | tokens | minutes | launches a block | device peak | longest stages (s) |",
        "|" + "---|" * 7,
    ]
    for model, methods in held.items():
        for method in (name for name in PRESETS if name in methods):
            for tokens, cost in sorted(methods[method].items(), key=lambda item: int(item[0])):
                longest = sorted(cost["stages"].items(), key=lambda item: -item[1])[:4]
                read = "" if method == "rtn" else f"{int(tokens):,}"
                lines.append(
                    f"| {model} | `{method}` | {read} | {cost['seconds'] / 60:.1f} | {cost['launches_per_block']:,} | "
                    f"{cost['device_peak_bytes'] / 1e9:.1f} GB | "
                    f"{', '.join(f'{name} {seconds:,.0f}' for name, seconds in longest)} |"
                )
    return "\n".join(lines)


def plan_beside_count() -> str:
    """The planner's model of a card beside the count."""
    head = ("model", "method", "tokens", "seconds, plan", "counted", "ratio", "peak, plan", "counted", "ratio")
    body = []
    for model, method, tokens in counted.ENTRIES:
        with hollow(counted.MODELS[model][0]) as folder:
            found = counted.beside(open_headers(str(folder)), model, method, tokens)
        seconds, whole = sum(found.seconds.values()), found.counted["seconds"]
        peak, own = found.peak_bytes, found.counted_peak_bytes
        read = "" if method == "rtn" else f"{tokens:,}"
        row = [model, f"`{method}`", read, f"{seconds:,.0f}", f"{whole:,.0f}", f"{seconds / whole:.2f}"]
        body.append([*row, f"{peak / 1e9:.1f} GB", f"{own / 1e9:.1f} GB", f"{peak / own:.2f}"])
    return table(head, body)


PARTS: dict[str, Callable[[], str]] = {
    "GPU cost": gpu_cost,
    "plan beside the count": plan_beside_count,
    "config keys": config_keys,
    "broken configs": broken_configs,
    "broken configs, counted": unchanged_configs,
    "peers, all rows": peers_all,
    "peers, groups of 128": peers_short,
    "peers, beside the best other tool": peers_best,
    "real model, groups of 64": lambda: kept.short(64),
    "real model, all rows": kept.whole,
    "Scout": scout,
    "Scout's time": scout_time,
    "sizes": sizes,
    "Scout on its card": scout_card,
    "recipes": recipes,
    "methods": methods,
    "verbs": verbs,
    **{f"rules of {engine}": (lambda engine=engine: rules(engine)) for engine in ENGINES},
}


def documents() -> list[Path]:
    """Every document that people read, in the order of their paths."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "demo" / "README.md"]
    return sorted([*found, *HERE.rglob("*.md")])


def rendered(text: str) -> str:
    """A document with current generated parts. Raises KeyError when it names a part that PARTS lacks."""
    return PART.sub(lambda m: m[1] + PARTS[m["name"]]() + m[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when something would change")
    check = parser.parse_args().check
    wanted = {path: rendered(path.read_text(encoding="utf-8")) for path in documents()}
    wanted |= {ROOT / name: draw() for name, draw in PICTURES.items()}
    stale = [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(path.relative_to(ROOT))
        if not check:
            path.write_text(wanted[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
