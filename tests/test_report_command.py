"""The command `onecard report`: the page it writes, and the records and paths that it refuses."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file

from command_line import Refuse
from onecard.core.errors import InputError
from onecard.core.record.reading import read_record
from onecard.report import html
from pages import Elements
from records import full_record

pytestmark = pytest.mark.usefixtures("small_plotly")


def test_the_command_writes_a_page_and_one_line(onecard: Callable[..., Result], tmp_path: Path) -> None:
    run, out = tmp_path / "run.json", tmp_path / "page.html"
    run.write_text(json.dumps(full_record()))
    result = onecard("report", run, "-o", out)
    line = json.loads(result.stdout)
    assert line["bytes"] == out.stat().st_size
    assert line["figures"] == 14
    assert line["report"] == str(out)
    assert "14 charts" in result.stderr
    first = out.read_bytes()
    assert onecard("report", run, "-o", out).exit_code == 0, "a report is replaced by a report"
    assert out.read_bytes() == first


def test_a_finished_checkpoint_has_a_report(
    emitted: Callable[..., tuple[Path, Result]], onecard: Callable[..., Result], tmp_path: Path
) -> None:
    """The record of a real `quantize` gives every section but those that were not requested."""
    folder, _ = emitted("scout")
    result = onecard("report", folder, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert {*html.SECTIONS, "provenance"} - set(line["sections"]) == {"flips"}
    text = Elements((tmp_path / "page.html").read_text()).text
    record = json.loads((folder / "onecard.json").read_text())
    assert f"{record['kl']['kl_mean_nats']:.5f}" in text
    assert f"{record['plan']['emitted_bytes']:,}" in text


def test_a_changed_scale_of_one_expert_is_named_as_the_worst(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """From the files to the page: one scale tensor grows by a tenth, `verify` runs, and the page names the expert."""
    spoilt = Path(shutil.copytree(emitted("scout")[0], tmp_path / "spoilt"))
    name = "language_model.model.layers.1.feed_forward.experts.5.down_proj.weight_scale"
    (path,) = [path for path in spoilt.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name] * 1.1}, path, metadata={"format": "pt"})
    record = tmp_path / "verify.json"
    assert onecard("verify", baby("scout"), spoilt, *texts[2:], "--record", record).exit_code == 0
    assert onecard("report", record, "-o", tmp_path / "page.html").exit_code == 0
    text = Elements((tmp_path / "page.html").read_text()).text
    assert "The worst is expert 5 of block 1," in text
    assert "block\u00a01, expert\u00a05" in text.partition("The worst experts")[2][:400]


def _changed(**changes: Any) -> str:
    return json.dumps(full_record() | changes)


def _without(*path: str | int) -> str:
    """A full record without the value at `path`."""
    data: Any = full_record()
    part = data
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("content", "needles"),
    [
        ("{", ["JSON"]),
        ('{"schema_version": 2, "x": NaN}', ["NaN"]),
        ("[" * 100_000, ["JSON"]),
        ("[]", ["schema_version"]),
        ('{"model_type": "llama4"}', ["no record of onecard"]),
        (_changed(schema_version=99), ["99", "1 and 2"]),
        (_changed(model={}, plan={"emitted_bytes": "many"}), ["model.name", "plan.emitted_bytes"]),
        (_changed(kl={"tokens": 1}), ["kl.documents", "kl.kl_mean_nats"]),
        (_changed(kl=full_record()["kl"] | {"histogram": {"edges_nats": [0, 1], "tokens": [1, 2]}}), ["kl.histogram"]),
        (_changed(blocks=[{"block": 0, "expert_rows": ["a"]}] * 40), ["blocks.0.expert_rows", "and 28 more"]),
        *(
            (_without("kl", "worst_tokens", 2, key), [f"kl.worst_tokens.2.{key}: Field required"])
            for key in ("document", "position", "kl_nats", "token")
        ),
        *(
            (_without("flips", *path), [f"flips.{'.'.join(map(str, path))}: Field required"])
            for path in (
                ("all", "task"),
                ("all", "items"),
                ("all", "accuracy_reference"),
                ("tasks", 0, "accuracy_quantized"),
                ("tasks", 0, "right_to_wrong"),
                ("tasks", 0, "wrong_to_right"),
                ("all", "changed", "count"),
            )
        ),
    ],
)
def test_what_is_no_record_is_refused(
    onecard: Callable[..., Result], refused: Refuse, tmp_path: Path, content: str, needles: list[str]
) -> None:
    run, out = tmp_path / "run.json", tmp_path / "page.html"
    run.write_text(content)
    refused(onecard("report", run, "-o", out), "run.json", *needles)
    assert not out.exists()


def test_what_is_not_there_is_refused(onecard: Callable[..., Result], refused: Refuse, tmp_path: Path) -> None:
    refused(onecard("report", tmp_path / "nothing", "-o", tmp_path / "p.html"), "nothing", "verify --record")
    refused(onecard("report", tmp_path, "-o", tmp_path / "p.html"), "onecard.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="JSON"):
        read_record(tmp_path / "binary")


def test_somebody_elses_file_is_not_replaced(onecard: Callable[..., Result], refused: Refuse, tmp_path: Path) -> None:
    run, out = tmp_path / "run.json", tmp_path / "page.html"
    run.write_text(json.dumps(full_record()))
    out.write_text("<p>mine</p>")
    refused(onecard("report", run, "-o", out), "page.html", "--overwrite")
    assert out.read_text() == "<p>mine</p>"
    refused(onecard("report", run, "-o", tmp_path), "folder")
    refused(onecard("report", run, "-o", tmp_path / "none" / "page.html"), "folder")
    assert onecard("report", run, "-o", out, "--overwrite").exit_code == 0
    assert html.is_report(out.read_bytes()[:4096])


def test_the_records_of_tests_hang_together() -> None:
    data = full_record(3)
    assert copy.deepcopy(data) == full_record(3)
    kl = data["kl"]
    assert sum(kl["histogram"]["tokens"]) == kl["tokens"] == sum(d["tokens"] for d in kl["by_document"])
    assert full_record(3, shift=1.1)["kl"]["kl_mean_nats"] == pytest.approx(1.1 * kl["kl_mean_nats"])
