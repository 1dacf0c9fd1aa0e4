"""The licence in a model card: which it is, what Llama's terms demand, and where the original comes from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from huggingface_hub import ModelCard

from onecard.checkpoint.provenance import front_matter, hub_origin, source_card
from onecard.report.licence import EU_RESTRICTION, NOTICE_LINE, Licence, has_notice, licence_of, unmet_terms
from papers import draw_card, edit_record, record_of
from records import allocation_facts

META = "LLAMA 4 COMMUNITY LICENSE AGREEMENT\nLlama 4 Version Effective Date: April 5, 2025\n"


# --- licences


@pytest.mark.parametrize(
    ("arguments", "licence"),
    [
        ((None, None, {"license": "mit"}, {}, None), Licence("mit")),
        (("apache-2.0", None, {"license": "mit"}, {}, None), Licence("apache-2.0")),
        ((None, "psf-2.0", {}, {"LICENSE": "Python"}, None), Licence("other", "psf-2.0", "LICENSE")),
        ((None, None, {}, {"LICENCE.txt": "\n  Apache License\n  Version 2.0"}, None), Licence("apache-2.0")),
        ((None, None, {}, {"LICENSE": "MIT License\n\nCopyright"}, None), Licence("mit")),
        ((None, None, {}, {"LICENSE": "Ours alone"}, None), Licence("other", None, "LICENSE")),
        ((None, None, {}, {"LICENSE": META}, None), Licence("other", "llama4", "LICENSE")),
        ((None, None, {}, {}, "meta-llama/Llama-4-Scout-17B-16E"), Licence("other", "llama4", "LICENSE")),
        ((None, None, {}, {"LICENSE": "?"}, "meta-llama/Llama-4-Scout"), Licence("other", "llama4", "LICENSE")),
        (("llama4", None, {}, {}, None), Licence("other", "llama4", "LICENSE")),
        ((None, None, {}, {}, "Qwen/Qwen3-30B-A3B"), None),
    ],
)
def test_which_licence_it_is(arguments: tuple[Any, ...], licence: Licence | None) -> None:
    assert licence_of(*arguments) == (licence, [])


def test_metas_licence_and_another_contradict() -> None:
    found, problems = licence_of("mit", None, {}, {"LICENSE": META}, None)
    assert found == Licence("mit")
    assert len(problems) == 1
    assert licence_of(None, None, {"license": "mit"}, {}, "meta-llama/Llama-4-Scout-17B-16E")[1] != []


def test_the_architecture_alone_is_not_metas_licence(folder: Path) -> None:
    """The baby has Llama 4's layout and not its licence."""
    assert record_of(folder)["model"]["family"] == "llama4"
    text = draw_card(folder)
    assert "Built with Llama" not in text
    assert "European Union" not in text
    assert not (folder / "NOTICE").exists()


def test_a_card_of_llama_says_what_its_licence_wants(folder: Path) -> None:
    """The card meets all terms but two: the user must add the licence's text and choose the name."""
    (folder / "NOTICE").write_text("Of somebody else.\n")
    text = draw_card(folder, "--base-model", "meta-llama/Llama-4-Scout-17B-16E-Instruct")
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "llama4", "LICENSE")
    notice = (folder / "NOTICE").read_text()
    assert notice == f"Of somebody else.\n{NOTICE_LINE}\n"
    assert unmet_terms("me/Llama-4-x", {"NOTICE": notice, "LICENSE": META}, text) == []
    assert len(unmet_terms("me/scout", {"NOTICE": notice}, text)) == 2
    assert EU_RESTRICTION in text
    again = draw_card(folder, "--base-model", "meta-llama/Llama-4-Scout-17B-16E-Instruct")
    assert (folder / "NOTICE").read_text() == notice
    assert again == text


def test_a_notice_may_have_line_breaks() -> None:
    assert has_notice({"Notice.txt": NOTICE_LINE.replace("Copyright", "\nCopyright")})
    assert not has_notice({"NOTICE": NOTICE_LINE.replace("4", "3")})
    assert not has_notice({"LICENSE": NOTICE_LINE})


# --- where the original comes from


def test_the_originals_licence_and_id_are_carried(
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    onecard: Callable[..., Result],
) -> None:
    """A source in the hub's cache, with a README: its id, revision, licence and languages are in record and card."""
    home = tmp_path / "models--somebody--Baby-MoE" / "snapshots" / ("a" * 40)
    shutil.copytree(baby("qwen3"), home)
    front = (
        "license: other\nlicense_name: free\nlicense_link: LICENSE\nlanguage: [en, de]\nextra_gated_prompt: |-\n  no"
    )
    (home / "README.md").write_text(f"---\n{front}\n---\n# Baby\n")
    out = tmp_path / "out"
    assert onecard("quantize", home, out, "--recipe", recipe(method="rtn"), *texts).exit_code == 0
    model = record_of(out)["model"]
    assert model["hub"] == {"id": "somebody/Baby-MoE", "revision": "a" * 40}
    assert model["card"].keys() == {"license", "license_name", "license_link", "language"}
    result = onecard("card", out)
    assert json.loads(result.stdout)["lacking"] == []
    data = ModelCard((out / "README.md").read_text()).data.to_dict()
    assert data["base_model"] == "somebody/Baby-MoE"
    assert (data["license_name"], data["language"]) == ("free", ["en", "de"])
    assert "a" * 40 in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ["", "# no", "---\nlicense: [1, {}]\n---", "---\n!!python/object:os.system\n---", "---\na"]
)
def test_front_matter_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert source_card(tmp_path) == {}
    assert not front_matter("no dashes")
    assert hub_origin(tmp_path) == {}


def test_mixed_widths_are_said(folder: Path) -> None:
    facts = allocation_facts()
    assert "Widths are mixed" not in draw_card(folder)
    edit_record(folder, lambda record: record.update(allocation=facts))
    text = draw_card(folder)
    assert f"Widths are mixed: each of {len(facts['units'])} units" in text
    assert f"Predicted: {facts['predicted_kl_nats']:.4g} nats" in text
