"""`onecard publish` against a stand-in of the hub: what is refused, what is sent, and that sending can be resumed.

No test here leaves the machine: the hub is a thread on 127.0.0.1.
"""

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from huggingface_hub import constants

from command_line import listing
from hub_standin import TOKEN, Hub
from onecard.checkpoint.checksums import SUMS_NAME
from onecard.report.licence import EU_RESTRICTION, NOTICE_LINE
from onecard.report.model_card_words import FAILED_GATE
from papers import edit_record, resum

REPO = "somebody/baby-int4"
SAID = ("--base-model", "somebody/baby", "--license-name", "free-for-babies")
META = "LLAMA 4 COMMUNITY LICENSE AGREEMENT\nLlama 4 Version Effective Date: April 5, 2025\n"


@pytest.fixture(autouse=True)
def only_with_token(hub: Hub) -> None:
    hub.token = TOKEN


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is sent


def test_everything_is_sent_in_one_commit(hub: Hub, folder: Path, onecard: Callable[..., Result]) -> None:
    """Afterwards the hub holds the folder byte for byte, card included. A second time nothing is sent."""
    result = onecard("publish", folder, REPO, *SAID, "--private")
    assert result.exit_code == 0, result.output + repr(result.exception)
    line = json.loads(result.stdout)
    assert (line["url"], line["refused"]) == (f"{hub.endpoint}/{REPO}", [])
    sent = dict(hub.repos[REPO])
    del sent[".gitattributes"]
    assert sent == contents(folder)
    assert line["files"] == {name: len(data) for name, data in sent.items()}
    assert "base_model: somebody/baby\n" in sent["README.md"].decode()
    assert hub.private[REPO]
    assert len(hub.commits) == 1
    assert len(hub.puts) == len(shards(folder))
    assert onecard("publish", folder, REPO).exit_code == 0
    assert len(hub.puts) == len(shards(folder))


def test_only_files_of_the_run_are_sent(hub: Hub, folder: Path, onecard: Callable[..., Result]) -> None:
    (folder / ".env").write_text("PASSWORD=1")
    (folder / "notes.txt").write_text("mine")
    result = onecard("publish", folder, REPO, *SAID)
    assert json.loads(result.stdout)["not_sent"] == [".env", "notes.txt"]
    assert not {".env", "notes.txt"} & hub.repos[REPO].keys()


def test_a_link_to_elsewhere_is_not_sent(
    hub: Hub, folder: Path, onecard: Callable[..., Result], tmp_path: Path
) -> None:
    """LICENSE2 would count as a licence, but a link may lead to any file of the machine."""
    (tmp_path / "secret").write_text("mine")
    (folder / "LICENSE2").symlink_to(tmp_path / "secret")
    assert onecard("publish", folder, REPO, *SAID).exit_code == 0
    assert "LICENSE2" not in hub.repos[REPO]
    assert not any(data == b"mine" for data in hub.repos[REPO].values())


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_stopped_and_resumed(hub: Hub, folder: Path, onecard: Callable[..., Result], shard: int) -> None:
    """After Ctrl-C during an upload the hub shows nothing. The same command then sends the rest, and no shard twice."""
    assert len(shards(folder)) == 3

    def stop(number: int) -> None:
        if number == shard:
            os.kill(os.getpid(), signal.SIGINT)

    hub.before_put = stop
    # A process started in the background of a shell script ignores SIGINT from birth.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopped = onecard("publish", folder, REPO, *SAID)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert hub.commits == []
    hub.before_put = lambda number: None
    assert onecard("publish", folder, REPO, *SAID).exit_code == 0
    assert sorted(hub.puts) == sorted({*hub.puts})
    assert len(hub.commits) == 1
    assert contents(folder).items() <= hub.repos[REPO].items()


def test_a_newer_version_takes_the_place_of_the_old(hub: Hub, folder: Path, onecard: Callable[..., Result]) -> None:
    """Unchanged shards are not sent, and missing ones are deleted in the same commit."""
    assert onecard("publish", folder, REPO, *SAID).exit_code == 0
    hub.repos[REPO]["model-00009-of-00009.safetensors"] = b"of an older version"
    sent = len(hub.puts)
    edit_record(folder, lambda record: record["warnings"].append("a new one"))
    assert onecard("card", folder, *SAID).exit_code == 0
    assert onecard("publish", folder, REPO).exit_code == 0
    assert len(hub.puts) == sent
    assert "model-00009-of-00009.safetensors" not in hub.repos[REPO]
    assert "a new one" in hub.repos[REPO]["README.md"].decode()
    assert not any(name.endswith(".safetensors") and "00009" not in name for name in hub.commits[1])


def test_weights_of_somebody_else_are_not_overwritten(
    hub: Hub, folder: Path, onecard: Callable[..., Result], refused: Callable[..., str]
) -> None:
    hub.repos[REPO] = {"model.safetensors": b"theirs"}
    refused(onecard("publish", folder, REPO, *SAID), "did not put there", "name another")
    assert hub.repos[REPO] == {"model.safetensors": b"theirs"}


# --- the dry run and the token


def test_a_dry_run_asks_nobody_and_writes_nothing(
    hub: Hub, folder: Path, onecard: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = listing(folder)
    result = onecard("publish", folder, REPO, *SAID, "--dry-run")
    line = json.loads(result.stdout)
    assert (result.exit_code, line["dry_run"], line["card"]) == (0, True, "to be written")
    assert line["bytes"] == sum(line["files"].values()) > sum(path.stat().st_size for path in folder.iterdir())
    assert "README.md" in line["files"]
    for name in line["files"]:
        assert name in result.stderr
    assert hub.asked == []
    assert listing(folder) == before


def test_the_token_is_nowhere(
    hub: Hub,
    folder: Path,
    onecard: Callable[..., Result],
    caplog: pytest.LogCaptureFixture,
    refused: Callable[..., str],
) -> None:
    """The token reaches the hub and no output, log or file, also when the hub answers with an error."""
    with caplog.at_level(logging.DEBUG):
        said = [onecard("publish", folder, REPO, *SAID).output]
        hub.before_put = lambda number: 403
        (folder / "README.md").unlink()
        hub.blobs.clear()
        hub.repos[REPO] = {}
        said.append(refused(onecard("publish", folder, REPO, *SAID), "status 403", "not sent twice", code=4))
    assert hub.tokens - {""} == {TOKEN}  # the library asks for a public list without one
    written = [path.read_bytes().decode(errors="replace") for path in folder.iterdir()]
    for text in (*said, caplog.text, *written, *(data.decode(errors="replace") for data in hub.repos[REPO].values())):
        assert TOKEN not in text


def test_without_a_token_nothing_is_asked(
    hub: Hub,
    folder: Path,
    onecard: Callable[..., Result],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused(onecard("publish", folder, REPO, *SAID), "hf auth login")
    assert hub.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused(onecard("publish", folder, REPO, *SAID), "status 401", "hf auth login")


def test_a_hub_that_is_not_there(
    folder: Path,
    hub: Hub,
    onecard: Callable[..., Result],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(onecard("publish", folder, REPO, *SAID), "Run the same command again", code=4)


# --- what is refused


@pytest.fixture
def refuses(hub: Hub, folder: Path, onecard: Callable[..., Result]) -> Callable[..., dict[str, Any]]:
    """`publish` and its dry run refuse with one message that holds every needle, without a request to the hub."""

    def check(*needles: str, arguments: tuple[object, ...] = SAID, repo: str = REPO) -> dict[str, Any]:
        result = onecard("publish", folder, repo, *arguments)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        dry = onecard("publish", folder, repo, *arguments, "--dry-run")
        line: dict[str, Any] = json.loads(dry.stdout)
        assert dry.exit_code == 2
        for needle in needles:
            assert needle in result.stderr
            assert any(needle in problem for problem in line["refused"]), (needle, line["refused"])
        assert len(line["refused"]) == len(needles), line["refused"]
        assert hub.asked == []
        return line

    return check


def test_an_unfinished_folder(folder: Path, refuses: Callable[..., dict[str, Any]]) -> None:
    (folder / "config.json").unlink()
    refuses("is not finished")


def test_an_unverified_folder(folder: Path, refuses: Callable[..., dict[str, Any]]) -> None:
    edit_record(folder, lambda record: record["kl"].clear())
    refuses("is not verified")


def test_a_folder_of_another_tool(folder: Path, refuses: Callable[..., dict[str, Any]]) -> None:
    (folder / "onecard.json").unlink()
    refuses("has no onecard.json")


def test_a_folder_without_digests(folder: Path, refuses: Callable[..., dict[str, Any]]) -> None:
    (folder / SUMS_NAME).unlink()
    refuses("SHA256SUMS is missing, and onecard.json names it", "there is no SHA256SUMS")


def test_digests_that_no_longer_match_are_never_forced(folder: Path, refuses: Callable[..., dict[str, Any]]) -> None:
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    refuses(f"{shard.name} has another digest", arguments=(*SAID, "--force"))


def test_no_base_model_and_no_licence_are_told_at_once(refuses: Callable[..., dict[str, Any]]) -> None:
    refuses("names no base_model", "has no license_name", arguments=())


def test_names_that_are_none_of_the_hubs(refuses: Callable[..., dict[str, Any]]) -> None:
    refuses("no id of a repository", repo="just-a-name")
    refuses("is no hub id", arguments=("--base-model", "/home/me/model", "--license", "mit"))
    refuses("is no id of the hub", arguments=("--base-model", "a/b", "--license", "My Licence"))


def test_a_failed_gate_is_refused_unless_it_is_forced(
    folder: Path, hub: Hub, refuses: Callable[..., dict[str, Any]], onecard: Callable[..., Result]
) -> None:
    edit_record(folder, lambda record: record.update(gate={"passed": False, "checks": []}))
    refuses("its gate failed")
    result = onecard("publish", folder, REPO, *SAID, "--force")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["forced"] != []
    assert FAILED_GATE in hub.repos[REPO]["README.md"].decode()


def test_a_card_of_ones_own_must_say_that_the_gate_failed(folder: Path, refuses: Callable[..., dict[str, Any]]) -> None:
    edit_record(folder, lambda record: record.update(gate={"passed": False}))
    front = "base_model: a/b\nbase_model_relation: quantized\nlicense: mit"
    (folder / "README.md").write_text(f"---\n{front}\n---\n# All is well\n")
    refuses(FAILED_GATE, arguments=("--force",))


def test_a_card_of_another_record(
    folder: Path, onecard: Callable[..., Result], refuses: Callable[..., dict[str, Any]]
) -> None:
    assert onecard("card", folder, *SAID).exit_code == 0
    edit_record(folder, lambda record: record["warnings"].append("another run"))
    refuses("was drawn from another record", arguments=())


def test_a_card_of_ones_own_is_sent_as_it_is(folder: Path, hub: Hub, onecard: Callable[..., Result]) -> None:
    card = "---\nbase_model: a/b\nbase_model_relation: quantized\nlicense: mit\n---\n# Mine\n"
    (folder / "README.md").write_text(card)
    assert onecard("publish", folder, REPO).exit_code == 0
    assert hub.repos[REPO]["README.md"].decode() == card


# --- Llama's licence


def test_every_unmet_term_of_llamas_licence_is_told_at_once(
    folder: Path, refuses: Callable[..., dict[str, Any]]
) -> None:
    (folder / "README.md").write_text(
        "---\nbase_model: meta-llama/Llama-4-Scout-17B-16E\nbase_model_relation: quantized\nlicense: other\n"
        "license_name: llama4\n---\n# Mine\n"
    )
    refuses(
        'must begin with "Llama"',
        "a copy of the licence",
        "a notice file",
        '"Built with Llama"',
        "European Union",
        arguments=(),
        repo="somebody/scout-int4",
    )


def test_llamas_licence_met(folder: Path, hub: Hub, onecard: Callable[..., Result]) -> None:
    """With Meta's licence in the folder, `card` writes everything else that the terms demand."""
    (folder / "LICENSE").write_text(META)
    resum(folder)
    repo = "somebody/Llama-4-Scout-int4"
    result = onecard("publish", folder, repo, "--base-model", "meta-llama/Llama-4-Scout-17B-16E-Instruct")
    assert result.exit_code == 0, result.output
    sent = {name: data.decode() for name, data in hub.repos[repo].items() if name in ("NOTICE", "README.md", "LICENSE")}
    assert sent["NOTICE"] == f"{NOTICE_LINE}\n"
    assert sent["LICENSE"] == META
    assert "Built with Llama" in sent["README.md"]
    assert EU_RESTRICTION in sent["README.md"]
    assert "license_name: llama4" in sent["README.md"]


def test_metas_licence_cannot_be_called_another(folder: Path, refuses: Callable[..., dict[str, Any]]) -> None:
    (folder / "LICENSE").write_text(META)
    resum(folder)
    refuses(
        "the licence is said to be apache-2.0",
        "a notice file",
        '"Built with Llama"',
        "European Union",
        arguments=("--base-model", "a/b", "--license", "apache-2.0"),
        repo="somebody/Llama-x",
    )
