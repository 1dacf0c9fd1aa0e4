"""--resume refuses to continue a run whose recipe, model, texts, version or OUT changed, and names what changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from command_line import Refuse
from runs import FAMILY, STAGES, Contents, Run, contents, differences


def changed_recipe(run: Run, recipe: Callable[..., Path]) -> None:
    run.recipe = recipe(damping=0.02)


def changed_config(run: Run, recipe: Callable[..., Path]) -> None:
    config = json.loads((run.model / "config.json").read_text())
    (run.model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def changed_size(run: Run, recipe: Callable[..., Path]) -> None:
    (file,) = run.model.glob("*.safetensors")
    save_file(load_file(file), file, metadata={"format": "pt", "note": "another header, the same weights"})


def changed_weights(run: Run, recipe: Callable[..., Path]) -> None:
    """A fine-tune: another model with the same shapes."""
    (file,) = run.model.glob("*.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def changed_tokenizer(run: Run, recipe: Callable[..., Path]) -> None:
    tokenizer = json.loads((run.model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (run.model / "tokenizer.json").write_text(json.dumps(tokenizer))


def changed_template(run: Run, recipe: Callable[..., Path]) -> None:
    template = run.model / "chat_template.jinja"
    template.write_text(template.read_text() + "!")


def changed_calibration(run: Run, recipe: Callable[..., Path]) -> None:
    change_text(run, 1)


def changed_evaluation(run: Run, recipe: Callable[..., Path]) -> None:
    change_text(run, 3)


def change_text(run: Run, option: int) -> None:
    """One letter more in one document."""
    lines = Path(run.texts[option]).read_text().splitlines()
    assert json.loads(lines[1])["text"]
    lines[1] = json.dumps({"text": json.loads(lines[1])["text"] + "x"})
    path = run.out.with_name("changed.jsonl")
    path.write_text("\n".join(lines))
    run.texts = [*run.texts[:option], str(path), *run.texts[option + 1 :]]


CHANGES: dict[str, tuple[Callable[[Run, Callable[..., Path]], None], str]] = {
    "recipe": (changed_recipe, "recipe's damping"),
    "a value of config.json": (changed_config, "source"),
    "a shard's header": (changed_size, "source"),
    "weights alone": (changed_weights, "source"),
    "tokenizer": (changed_tokenizer, ""),
    "chat template": (changed_template, ""),
    "calibration texts": (changed_calibration, "calibration texts"),
    "evaluation texts": (changed_evaluation, "evaluation texts"),
}


@pytest.fixture
def own(run: Run, copied: Callable[..., Path]) -> Run:
    """A run on a model that may be changed."""
    run.model = copied(FAMILY)
    return run


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("stage", [2, "finished"])
def test_changed_since(own: Run, refused: Refuse, recipe: Callable[..., Path], stage: Any, kind: str) -> None:
    """A changed run is neither resumed nor taken for finished. The message names the change, and no file is touched."""
    if stage == "finished":
        assert own().exit_code == 0
    else:
        own.stopped_at(stage)
    change, named = CHANGES[kind]
    change(own, recipe)
    before = contents(own.work), contents(own.out) if own.out.exists() else {}
    refused(own("--resume"), named, "--overwrite")
    assert (contents(own.work), contents(own.out) if own.out.exists() else {}) == before


def test_changed_version(run: Run, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    run.stopped_at(2)
    monkeypatch.setattr("onecard.pipeline.__version__", "99.0")
    refused(run("--resume"), "onecard was", "99.0", "--overwrite")


def test_every_change_is_named(own: Run, refused: Refuse, recipe: Callable[..., Path]) -> None:
    own.stopped_at(2)
    for kind in ("recipe", "a value of config.json", "evaluation texts"):
        CHANGES[kind][0](own, recipe)
    refused(own("--resume"), "recipe's damping was 0.1 and is 0.02", "source was", "evaluation texts was")


@pytest.mark.parametrize("stage", [STAGES - 1, STAGES])
def test_changed_out(run: Run, refused: Refuse, whole: Contents, stage: int) -> None:
    """A run that moved shards to one OUT is not continued in another; the first one can still be finished."""
    run.stopped_at(stage)
    other = run.out.with_name("other")
    refused(run("--resume", "--work", run.work, out=other), other)
    assert not other.exists()
    assert differences(run.resumed(), whole) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"command": "quantize"}', '{"strange": 1}'])
def test_a_damaged_record_in_a_finished_run(run: Run, refused: Refuse, content: str) -> None:
    assert run().exit_code == 0
    (run.out / "onecard.json").write_text(content)
    refused(run("--resume"), "onecard.json", "--overwrite")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"done": "2"}', '{"done": 2, "identity": 5}'])
def test_a_damaged_state(run: Run, refused: Refuse, whole: Contents, content: str) -> None:
    run.stopped_at(2)
    (run.work / "state.json").write_text(content)
    refused(run("--resume"), "state.json", "--overwrite")
    assert run("--overwrite").exit_code == 0
    assert differences(contents(run.out), whole) == []
