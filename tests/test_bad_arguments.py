"""Recipes, paths and devices that cannot be used: one clean message, and nothing is written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from command_line import Refuse
from onecard.core.limits import Limits

# --- recipes


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"colour": "red", "grupsize": 32}, ["colour: unknown key", "grupsize: unknown key", "group_size"]),
        ({"bits": 3, "method": "magic"}, ["bits", "method"]),
        ({"restarts": -1, "tabu_moves": -1}, ["restarts", "tabu_moves"]),
        ({"name": "red \x1b[31m"}, ["control characters"]),
        ({"keep_modules": ["*"]}, ["keeps every module"]),
        ({"group_size": 12}, ["group_size", "12"]),
        ({"group_size": 0}, ["group_size"]),
        ({"quantize_roles": []}, ["quantize_roles"]),
        ({"quantize_roles": ["expert", "router"]}, ["quantize_roles"]),
        ({"damping": 0, "calibration_rows": 0}, ["damping", "calibration_rows"]),
        ({"damping": float("nan")}, ["damping"]),
        ({"shrinkage": float("inf")}, ["shrinkage"]),
        ({"calibration": {"source": "demo", "sheet": 3}}, ["calibration.sheet"]),
        ({"name": None}, ["name"]),
        ({"family": "qwen3_moe"}, ["qwen3_moe", "llama4"]),
        ({"keep_modules": ["*.nowhere.*", "*nothing*"]}, ["*.nowhere.*", "*nothing*"]),
        ({"keep_modules": ["*.layers.0.*.experts.3.*"]}, ["model.layers.0.feed_forward.experts"]),
        (
            {"keep_modules": ["*.0.*.q_proj", "*.1.*.experts.3.gate_proj"], "quantize_roles": ["expert", "attention"]},
            ["model.layers.0.self_attn.q_proj", "model.layers.1.feed_forward.experts.3.gate_proj"],
        ),
        ({"group_size": 64}, ["group_size 64", "96"]),
        ({"group_size": 40, "keep_modules": ["*nothing*"]}, ["group_size 40", "64", "96", "*nothing*"]),
        ({"quantize_roles": ["mlp"]}, ["mlp"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_recipe_that_cannot_be_used(
    baby: Callable[..., Path],
    refuse: Refuse,
    recipe: Callable[..., Path],
    onecard: Callable[..., Result],
    changes: dict[str, Any],
    needles: list[str],
    refused: Refuse,
) -> None:
    use = recipe(**changes)
    refuse(baby("llama4-text"), *needles, use=use)
    refused(onecard("plan", baby("llama4-text"), "--recipe", use), *needles)


@pytest.mark.parametrize(
    "text",
    ["name: [", "", "- a\n- b\n", "!!python/object/apply:os.mkdir [{marker}]\n", "a: &a [*a]\n", "\x00"],
    ids=["cut", "empty", "list", "python tag", "loop", "NUL"],
)
def test_recipe_that_is_no_recipe(baby: Callable[..., Path], refuse: Refuse, tmp_path: Path, text: str) -> None:
    path = tmp_path / "strange.yaml"
    path.write_text(text.replace("{marker}", str(tmp_path / "mark")))
    refuse(baby("llama4-text"), "strange.yaml", use=path)
    assert not (tmp_path / "mark").exists()


def test_recipe_that_does_not_exist(
    baby: Callable[..., Path], refuse: Refuse, onecard: Callable[..., Result], tmp_path: Path, refused: Refuse
) -> None:
    refuse(baby("llama4-text"), "'scuot'", "llama4-scout-h100", "rtn-int4", use="scuot")
    refused(onecard("recipes", "scuot"), "'scuot'", "llama4-scout-h100")
    refuse(baby("llama4-text"), "none.yaml", use=tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    refuse(baby("llama4-text"), "folder.yaml", use=tmp_path / "folder.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9".encode("latin-1"))
    refuse(baby("llama4-text"), "latin.yaml", use=tmp_path / "latin.yaml")


def test_a_recipe_that_says_a_thing_twice(baby: Callable[..., Path], refuse: Refuse, tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    twice.write_text("name: twice\ndescription: of two minds\ngroup_size: 32\ngroup_size: 64\n")
    refuse(baby("llama4-text"), "group_size", "twice", use=twice)


# --- paths


@pytest.mark.parametrize("where", ["inside MODEL", "MODEL itself", "a link into MODEL", "MODEL inside OUT"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]], ids=lambda f: "".join(f) or "fresh")
def test_out_and_model_lie_in_each_other(
    copied: Callable[..., Path], refuse: Refuse, tmp_path: Path, where: str, flags: list[str]
) -> None:
    model = copied()
    (tmp_path / "link").symlink_to(model)
    out = {
        "inside MODEL": model / "int4",
        "MODEL itself": model,
        "a link into MODEL": tmp_path / "link" / "int4",
        "MODEL inside OUT": tmp_path,
    }[where]
    refuse(model, out, model, out=out, arguments=flags)


def test_out_is_not_empty(baby: Callable[..., Path], refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    refuse(baby("llama4-text"), tmp_path / "out", "empty it")
    refuse(baby("llama4-text"), "--resume", "--overwrite", arguments=["--resume", "--overwrite"])
    (tmp_path / "out" / "onecard.json").write_text('{"files": []}')
    refuse(baby("llama4-text"), tmp_path / "out", "--overwrite")


def test_overwrite_takes_away_what_a_run_put_there_and_nothing_else(
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    refuse: Refuse,
    texts: list[str],
    tmp_path: Path,
) -> None:
    """--overwrite removes an older run's shards. It keeps other files beside them, and refuses a folder with somebody's
    bf16 model."""
    shutil.copytree(baby("llama4-text"), tmp_path / "original")
    refuse(baby("llama4-text"), "no run of onecard", out=tmp_path / "original", arguments=["--overwrite"])
    out, use = tmp_path / "out", recipe(method="rtn", max_shard_bytes=30_000)
    assert onecard("quantize", baby("llama4-text"), out, "--recipe", use, *texts).exit_code == 0
    assert len(list(out.glob("*.safetensors"))) > 3
    (out / "notes.txt").write_text("mine")
    (out / "onecard").mkdir()
    again = onecard("quantize", baby("llama4-text"), out, "--recipe", recipe(method="rtn"), *texts, "--overwrite")
    assert again.exit_code == 0, again.stderr
    listed = json.loads((out / "onecard.json").read_text())["files"]
    assert {p.name for p in out.iterdir()} == {*listed, "notes.txt", "onecard"}
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"files": ["../precious"]}', '{"files": [3]}', '{"files": [".."]}']
)
def test_a_manifest_that_onecard_did_not_write(
    manifest: str, baby: Callable[..., Path], refuse: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "onecard.json").write_text(manifest)
    refuse(baby("llama4-text"), "onecard.json", "empty", arguments=["--overwrite"])


def test_an_output_that_is_a_link_to_nothing(baby: Callable[..., Path], refuse: Refuse, tmp_path: Path) -> None:
    """It is found before the first weight is read, not when a night's work is to be moved there."""
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    refuse(baby("llama4-text"), "link to nothing")


def test_nothing_to_resume_in_a_foreign_folder(baby: Callable[..., Path], refuse: Refuse, tmp_path: Path) -> None:
    """--resume refuses a folder that no run of onecard made."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "precious"}')
    refuse(baby("llama4-text"), tmp_path / "out", arguments=["--resume"])


def test_out_or_work_is_a_file_or_under_one(baby: Callable[..., Path], refuse: Refuse, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    refuse(baby("llama4-text"), file, out=file)
    refuse(baby("llama4-text"), file, out=file / "out")
    refuse(baby("llama4-text"), file, arguments=["--work", file])
    refuse(baby("llama4-text"), file, arguments=["--work", file / "work"])


@pytest.mark.parametrize("out", [".", "/", ".."])
def test_out_without_a_name(
    baby: Callable[..., Path], refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """OUT.work needs a name beside OUT, so a nameless OUT is refused in words. (The folder is not empty either.)"""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    refuse(baby("llama4-text"), out, out=out)


@pytest.mark.parametrize("where", ["WORK is OUT", "OUT inside WORK", "WORK inside MODEL", "WORK is MODEL"])
def test_work_lies_where_it_must_not(
    copied: Callable[..., Path], refuse: Refuse, recipe: Callable[..., Path], tmp_path: Path, where: str
) -> None:
    """A run removes WORK with everything in it when it ends, and must write nothing into MODEL."""
    model, work = copied(), tmp_path / "work"
    out, work = {
        "WORK is OUT": (work, work),
        "OUT inside WORK": (work / "out", work),
        "WORK inside MODEL": (tmp_path / "out", model / "work"),
        "WORK is MODEL": (tmp_path / "out", model),
    }[where]
    refuse(model, work, use=recipe(method="rtn"), out=out, arguments=["--work", work])


def test_a_model_that_is_not_there(
    baby: Callable[..., Path], refuse: Refuse, onecard: Callable[..., Result], tmp_path: Path, refused: Refuse
) -> None:
    refuse(tmp_path / "no" / "such" / "model", tmp_path / "no", "demo", "hub id")
    refuse(baby("llama4-text") / "model.safetensors", "model.safetensors", "folder")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", tmp_path / "empty", "config.json")
    refused(onecard("verify", baby("llama4-text"), tmp_path / "no"), tmp_path / "no")


def test_hub_id_on_an_offline_machine(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse("someone/who-is-not-here", "someone/who-is-not-here", "network", "folder", code=4)


@pytest.mark.parametrize("device", ["tpu9", "meta", "mps", "", "cpu:x", "cuda:99"])
def test_unknown_device(baby: Callable[..., Path], refuse: Refuse, device: str) -> None:
    refuse(baby("llama4-text"), "device", "cpu", arguments=["--device", device])


# --- stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_stdout_that_takes_nothing(tmp_path: Path) -> None:
    for arguments in (["recipes", "demo"], ["recipes"], ["inspect", "demo"]):
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "onecard", *arguments]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 4
        assert "standard output" in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["gate", "x", "--baseline", "y", "--tolerance", "nan"],
        ["gate", "x", "--baseline", "y", "--tolerance-top1", "NaN"],
        ["plan", "demo", "--memory-share", "nan"],
        ["calibration", "synthesize", "demo", "x.jsonl", "--temperature", "nan"],
    ],
)
def test_an_option_that_is_no_finite_number_is_refused(words: list[str], onecard: Callable[..., Result]) -> None:
    """NaN is neither below a range nor above it."""
    result = onecard(*words)
    assert result.exit_code == 2
    assert "is no finite number" in result.stderr


def test_a_switch_is_no_limit() -> None:
    with pytest.raises(ValueError, match="not true or false"):
        Limits(max_kl_mean_nats=True)
