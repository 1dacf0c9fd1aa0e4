# make demo: quantize and verify the embedded model. make test: lint, types, tests. Both install what they need.
# make docs: rewrite the generated parts of the documents.
# make compat, compat-llamacpp, compat-vllm: other projects' programs read what we write and answer from it. Each is
# built in an environment of its own (benchmarks/compat; results in docs/formats.md). Not part of the tests.
# make peers: other quantizers beside ours (benchmarks/peers/README.md). It takes hours and is not part of the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT := out
QWEN := build/peers/models/qwen3-moe

.PHONY: venv demo test docs chromium style quality peers peers-env compat compat-env compat-llamacpp compat-vllm clean

venv: $(STAMP)

# constraints.txt pins the exact versions that were tested, torch's among them.
$(STAMP): setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "onecard needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: venv
	$(BIN)/onecard quantize demo $(OUT)/demo-rtn --recipe rtn-int4 --overwrite
	$(BIN)/onecard quantize demo $(OUT)/demo-int4 --recipe demo --overwrite
	$(BIN)/onecard generate $(OUT)/demo-int4 "What do you see?" --image demo/data/images/caption-001.png

# The report's tests need a browser. Where there is none and root may install it, take Debian's; else they are skipped.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && { apt-get -qq update; \
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; }; } >/dev/null 2>&1 || \
	echo "no Chromium here: the report's tests in a browser are skipped"

test: venv quality chromium
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: venv
	$(BIN)/python benchmarks/update_docs.py

peers-env: venv
	$(BIN)/python benchmarks/peers/environments.py

compat-env: venv
	$(BIN)/python benchmarks/peers/environments.py autogptq gptqmodel --build build/compat

# auto-gptq's and GPTQModel's own classes read what we write, and auto-gptq's GPTQ is compared with ours.
compat: compat-env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compat/run.py

# A peer whose environment cannot be built gets a row that says so.
peers: venv $(QWEN)
	-$(BIN)/python benchmarks/peers/environments.py
	$(BIN)/python benchmarks/peers/run.py --again

# A small Qwen3-MoE, trained once: a quarter of an hour.
$(QWEN): | venv
	$(BIN)/python benchmarks/peers/qwen3_moe.py $@

# llama.cpp, from the llama-cpp-python source package (needs cmake and a C++ compiler; ten minutes the first time).
compat-llamacpp: venv $(QWEN)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compat/llamacpp.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compat/llamacpp.py --model $(QWEN)

# vLLM's own loader and its CPU engine on our files (docs/vllm.md); 3.5 GB in build/compat/vllm.
compat-vllm: venv $(QWEN)
	$(BIN)/python benchmarks/compat/vllm_environment.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compat/vllm_loads.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compat/vllm_breaks.py

style: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The package is the repository's root; mypy finds it under its name through a link.
quality: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p build/types && ln -sfn ../.. build/types/onecard
	MYPYPATH=build/types $(BIN)/mypy -p onecard

clean:
	rm -rf $(OUT) build .mypy_cache .ruff_cache .pytest_cache
