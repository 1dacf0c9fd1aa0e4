"""benchmarks/real.py without a network: a Llama out of GGUF, its mixture, and texts of which no two roles share one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import judge  # noqa: E402

from onecard.checkpoint.source import open_folder  # noqa: E402
from onecard.core.rows import Row  # noqa: E402
from onecard.eval.kl import TokenResults  # noqa: E402
from onecard.models.families import load_adapter  # noqa: E402
from real_model import documents, jobs, judging, kept, llama_gguf, mixture, pages  # noqa: E402
from real_model.documents import Text  # noqa: E402

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ t", "1 2", "h e", "Ġt he")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def byte_tokens() -> list[str]:
    """GPT-2's 256 printable characters for bytes, by transformers' table."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=len(SPECIAL) + 256 + len(MERGES),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = (parameter + 0.2 * torch.randn_like(parameter)).bfloat16().float()
    return model


@pytest.fixture(scope="module")
def gguf_file(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` as llama.cpp's converter writes it: rows of q and k are permuted there (`LlamaModel.permute`)."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config, writer = llama.config, GGUFWriter(path, "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50_000.0)
    writer.add_rope_dimension_count(16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    merged = [merge.replace(" ", "") for merge in MERGES]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *byte_tokens(), *merged])
    writer.add_token_types([llama_gguf.CONTROL] * len(SPECIAL) + [1] * (256 + len(MERGES)))
    writer.add_token_merges(list(MERGES))
    for add, number in (
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_pad_token_id, 2),
    ):
        add(number)
    writer.add_chat_template(TEMPLATE)
    theirs = {ours: name for name, ours in (llama_gguf.TOP | llama_gguf.IN_BLOCK).items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in llama.model.state_dict(prefix="model.").items():
        stem = name.removesuffix(".weight")
        rows = heads.get(stem.rpartition(".")[2])
        value = tensor.numpy()
        if rows is not None:
            value = value.reshape(rows, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        block, _, inside = stem.removeprefix("model.layers.").partition(".")
        known = f"blk.{block}.{theirs[inside]}" if "layers" in stem else theirs[stem]
        writer.add_tensor(f"{known}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folders(gguf_file: Path) -> dict[str, Path]:
    """The tiny model in both forms, as `make` writes it."""
    reader = GGUFReader(gguf_file)
    config = llama_gguf.config_of(reader)
    tensors = llama_gguf.tensors_of(reader, config)
    made = {
        "dense": (config, tensors),
        "mixture": (mixture.mixture_config(config), mixture.mixture_tensors(tensors)),
    }
    found = {form: gguf_file.parent / form for form in made}
    for form, (its_config, its_tensors) in made.items():
        llama_gguf.write_folder(found[form], its_config, its_tensors)
        llama_gguf.write_tokenizer(reader, found[form])
    return found


def logits(folder: Path, **given: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 99)[None]).logits


def test_a_llama_out_of_gguf_is_the_one_that_went_in(
    llama: LlamaForCausalLM, gguf_file: Path, folders: dict[str, Path]
) -> None:
    """Rows of q and k are back in their order; transformers' own reader of GGUF agrees."""
    with torch.inference_mode():
        wanted = llama(input_ids=torch.arange(3, 99)[None]).logits
    found = logits(folders["dense"])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(gguf_file.parent, gguf_file=gguf_file.name), found, rtol=0, atol=1e-4)


def test_the_mixture_computes_what_the_dense_form_does(folders: dict[str, Path]) -> None:
    dense = logits(folders["dense"])
    assert dense.std() > 0.5, "a flat model would show nothing"
    torch.testing.assert_close(logits(folders["mixture"]), dense, rtol=0, atol=1e-4)


def test_a_dense_weight_comes_back_from_its_parts() -> None:
    dense = {f"model.layers.0.{name}.weight": torch.randn(8, 8) for name in ("self_attn.o_proj", "mlp.down_proj")}
    dense |= {f"model.layers.0.mlp.{name}.weight": torch.randn(16, 8) for name in ("gate_proj", "up_proj")}
    parts = mixture.mixture_tensors(dense)
    for name, weight in dense.items():
        given = [parts[part] for part in mixture.mixture_names(name)]
        assert torch.equal(mixture.dense_weight(name, given), weight), name


def test_onecard_reads_the_mixture_whole(folders: dict[str, Path]) -> None:
    """Names and shapes are what its adapter expects, and the names of parts are those that a job quantizes."""
    adapter = load_adapter(folders["mixture"])
    reader = load_adapter(folders["mixture"]).expected()
    config = LlamaConfig.from_pretrained(folders["dense"])
    weights = [part for name in mixture.linear_weights(config) for part in mixture.mixture_names(name)]
    linear = {f"{name}.weight" for block in range(adapter.n_blocks) for _, name, _, _ in adapter.modules(block)}
    assert set(weights) == linear
    assert len(weights) == len(linear)
    assert linear < reader.keys()


def test_the_tokenizer_splits_digits_and_gives_texts_back(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["dense"])
    assert tokenizer.tokenize("at 12 the") == ["a", "t", "Ġ", "1", "2", "Ġthe"]
    text = "Größe 量子 12\n\tdef f(x): return 'the'"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    said = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert tokenizer(said).input_ids[0] == SPECIAL.index("<|im_start|>")
    assert tokenizer.eos_token_id == SPECIAL.index("<|im_end|>")


def many_texts() -> list[Text]:
    texts = []
    for kind in (*documents.HOME, *documents.AWAY):
        for number in range(300):
            unit = f"page-{number}"
            texts += [Text(kind, unit, piece, documents.role_of(unit), f"{kind} {unit} {piece}") for piece in range(2)]
    return texts


def test_no_document_is_in_two_roles() -> None:
    texts = many_texts()
    found = documents.roles(texts, lambda text: documents.PIECE_TOKENS)
    for number, one in enumerate(found):
        for other in list(found)[number + 1 :]:
            if {one, other} != {"calibration", "pool"}:  # the pool is for calibration, too
                assert not {text.unit for text in found[one]} & {text.unit for text in found[other]}
    kinds = documents.facts(found)
    assert set(kinds["calibration"]) == set(documents.HOME)
    assert set(kinds["pool"]) == set(documents.AWAY)
    for role in ("choice", "test"):
        assert sum(kinds[role][kind] for kind in documents.HOME) == documents.HOME_ROWS
        assert all(kinds[role][kind] == documents.AWAY_ROWS for kind in documents.AWAY)
    assert len(found["calibration"]) * documents.PIECE_TOKENS >= documents.CALIBRATION_ROWS * documents.ROW_TOKENS


def test_texts_that_are_too_few_are_refused() -> None:
    texts = [text for text in many_texts() if text.kind != "german"]
    with pytest.raises(ValueError, match="16 rows of german"):
        documents.roles(texts, lambda text: documents.PIECE_TOKENS)


def test_no_licence_is_in_two_roles() -> None:
    names = [name for those in documents.LICENCES.values() for name in those]
    assert len(set(names)) == len(names)
    assert set(documents.LICENCES) == set(documents.ROLES)


def test_pieces_are_full_and_follow_one_another() -> None:
    parts = [f"part{number} " + "x " * 100 for number in range(40)]
    found = list(documents.pieces(parts, "", lambda text: text.count(" "), 5))
    assert len(found) == 5
    assert all(text.count(" ") >= documents.PIECE_TOKENS for text in found)
    assert "".join(parts).startswith("".join(found))


def test_a_page_gives_its_paragraphs_and_formulas() -> None:
    html = (
        "<html><head><title>no</title></head><body><div class='toc'><div>no</div>no</div><p>One  \n two"
        "<a class='headerlink'>no</a></p><script>no</script><pre>a\n  b</pre>"
        "<p>If <img class='math' alt='x^2' src='y'/> holds.</p><ul class='docnav'><li>no</li></ul></body></html>"
    )
    assert pages.paragraphs(html) == ["One two", "a\n  b", "If $x^2$ holds."]


def test_paragraphs_in_another_language_are_left_out() -> None:
    english = "The package is installed on the machine, and the user can start it."
    assert documents.fits("handbook", english)
    assert not any(documents.fits(kind, english) for kind in ("german", "french", "chinese"))
    assert documents.fits("german", "Das Paket wird auf dem Rechner installiert und der Benutzer startet es.")
    assert documents.fits("french", "Le paquet est installé sur la machine et les droits sont ceux de l'utilisateur.")
    assert documents.fits("chinese", "此协议不补偿封包的遗漏，也不在意封包依序到达 (UDP)。")


def test_kinds_are_judged_apart_and_home_together() -> None:
    kinds = ("handbook", "python", "german")
    rows = [Row(str(number), kind, torch.arange(3)) for number, kind in enumerate(kinds)]
    document = torch.tensor([0, 0, 1, 2])
    zeros = torch.zeros(4)
    tokens = TokenResults(*[zeros] * 8, document=document, position=document)
    found = {group.label: group.member.tolist() for group in judging.kinds_of(tokens, rows)}
    assert found["german"] == [False, False, False, True]
    assert found["python"] == [False, False, True, False]
    assert found[judging.HOME] == [True, True, True, False]


def test_the_judge_says_what_the_twin_walk_does(folders: dict[str, Path], tmp_path: Path) -> None:
    """The second time the original's rows are those that were kept."""
    tensors = load_file(folders["mixture"] / "model.safetensors")
    torch.manual_seed(1)
    changed = {
        name: tensor + 0.05 * torch.randn_like(tensor) if name in mixture.linear_weights(LlamaConfig()) else tensor
        for name, tensor in tensors.items()
    }
    save_file(changed, tmp_path / "model.safetensors")
    kinds = ("handbook", "python", "german", "german")
    rows = [Row(str(number), kind, torch.arange(3, 83).roll(number)) for number, kind in enumerate(kinds)]
    kept, other = tmp_path / "reference", open_folder(tmp_path)
    found = judging.kl_by_kind(folders["mixture"], other, rows, kept)
    whole = judge.kl(folders["mixture"], other, rows)
    mean = sum(found[kind]["kl_mean_nats"] * found[kind]["tokens"] for kind in set(kinds)) / whole["tokens"]
    assert mean == pytest.approx(whole["kl_mean_nats"], rel=1e-4)
    assert whole["kl_mean_nats"] > 1e-3
    written = [path.stat().st_mtime_ns for path in kept.iterdir()]
    assert len(written) == 1
    assert judging.kl_by_kind(folders["mixture"], other, rows, kept) == found
    assert [path.stat().st_mtime_ns for path in kept.iterdir()] == written


def test_a_job_has_a_name_of_its_own_and_one_result(tmp_path: Path) -> None:
    plain = jobs.job_of("fast", None, 64, {}, None)
    other = jobs.job_of("fast", None, 64, {"token_weighting": "none"}, None)
    few = jobs.job_of(None, "auto-round", 64, {}, 8)
    broad = jobs.job_of("fast", None, 64, {}, None, "broad")
    assert len({job.name for job in (plain, other, few, broad)}) == 4
    assert (plain.form, few.form) == ("mixture", "dense")
    assert other.tool().options == {"method": "fast", "token_weighting": "none"}
    with pytest.raises(ValueError, match="no such peer: onecard-fast"):
        jobs.job_of(None, "onecard-fast", 64, {}, None)
    results = tmp_path / "results.json"
    for error in ("first", "second"):
        jobs.keep(results, {"name": plain.name, "peer": "onecard-fast", "group": 64, "changed": {}, "error": error})
    assert [row["error"] for row in json.loads(results.read_text())] == ["second"]
    assert "second" in jobs.markdown(json.loads(results.read_text()))


@pytest.mark.parametrize("which", documents.MIXTURES)
def test_a_broader_mixture_halves_the_home_kinds_and_adds_as_many_tokens(which: str) -> None:
    def line(kind: str, number: int) -> dict[str, object]:
        words = " ".join([kind] * 100)
        whole = {"messages": [{"role": "user", "content": words}]} if kind == "chat" else {"text": words}
        return {"id": f"{kind}/{number}", "kind": kind, **whole}

    calibration = [line(kind, n) for kind in documents.HOME for n in range(400)]
    pool = [line(kind, n) for kind in documents.AWAY for n in range(400)]
    found = documents.mixed(calibration, pool, documents.MIXTURES[which], lambda text: len(text.split()))
    tokens = {kind: 100 * sum(each["kind"] == kind for each in found) for kind in (*documents.HOME, *documents.AWAY)}
    home = sum(tokens[kind] for kind in documents.HOME)
    if which == "home":
        assert found == calibration
        return
    wanted = documents.CALIBRATION_ROWS * documents.ROW_TOKENS / 2
    assert home == pytest.approx(wanted, abs=300)
    assert {kind for kind in documents.AWAY if tokens[kind]} == set(documents.MIXTURES[which])
    for kind in documents.MIXTURES[which]:
        assert tokens[kind] == pytest.approx(wanted / len(documents.MIXTURES[which]), abs=100)


def test_kept_figures_are_those_of_jobs_with_default_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer result takes an older one's place; one with other options or texts, or a failed one, is not shown."""

    def result(peer: str, mean: float, **more: object) -> dict[str, object]:
        bucket = {"kl_mean_nats": mean, "kl_low_nats": mean / 2, "kl_high_nats": mean * 2, "same_top1": 0.9}
        found = {"peer": peer, "group": 64, "changed": {}, "stored_bytes": 10, "cpu_seconds": 2.0}
        return found | {"kl": dict.fromkeys(kept.KINDS, bucket)} | more

    monkeypatch.setattr(kept, "KEPT", tmp_path / "real.json")
    results = tmp_path / "results.json"
    results.write_text(json.dumps([result("onecard-fast", 0.3), result("auto-round", 0.2)]))
    kept.keep(results)
    others = [
        result("onecard-best", 0.01, changed={"damping": 0.5}),
        result("onecard-balanced", 0.01, texts="broad"),
        result("llmcompressor-gptq", 0.01, error="exit code 1"),
    ]
    results.write_text(json.dumps([result("onecard-fast", 0.1), *others]))
    kept.keep(results)
    assert [(row.peer, row.kl["german"], row.low) for row in kept.read_kept()] == [
        ("onecard-fast", 0.1, 0.05),
        ("auto-round", 0.2, 0.1),
    ]
    assert "| onecard `fast` | **0.1000** |" in kept.short(64)
    assert "| over auto-round, 200 steps | 64 | 0.50 |" in kept.whole()
