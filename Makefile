# The set-up lives in .venv and is made when it is missing or pyproject.toml changes. Variables:
#   PYTHON   the Python to make it with, 3.10 or later
#   TRITON   the triton to install; `make test TRITON=triton` takes the newest
#   CPU      what `make test` leaves of this CPU: avx512 (no bfloat16, no VNNI), avx2, or none (none of our kernels)
#   MINUTES  how long `make fuzz` draws
#   MARK     the marker of the tests that `make test` runs, cpu for those that CPU= may change
#   CHECK    1 has `make test` watch the memory of our CPU kernels; see docs/cpu.md
PYTHON ?= python3
TRITON ?= triton==3.7.1
TORCH := torch==2.13.0

LANE_avx512 := FASTBERT_CPU=avx512 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512
LANE_avx2 := FASTBERT_CPU=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
LANE_none := FASTBERT_CPU=none ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
LANE = $(if $(CPU),$(or $(LANE_$(CPU)),$(error CPU=$(CPU): expected avx512, avx2 or none)))

INSTALLED := .venv/installed-$(subst =,,$(TRITON))

MINUTES ?= 20

.PHONY: demo test test-long test-as-gpu test-transformers test-serving newcomer check docs docs-shot fuzz static bench gate gpu report clean

# Text in, embeddings out, beside transformers on the same texts.
demo: $(INSTALLED)
	.venv/bin/python examples/demo.py

# All tests but the long ones and the exhaustive offline compile, a process a core and each on one thread. The script,
# and not `python -m pytest`, keeps this folder off sys.path.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(LANE) $(if $(CHECK),FASTBERT_CHECK=$(CHECK)) .venv/bin/pytest -n auto --dist worksteal $(if $(MARK),-m '$(MARK) and not long')

# The long ones, on other cases of what the others or the gate show.
test-long: $(INSTALLED)
	OMP_NUM_THREADS=1 .venv/bin/pytest -n auto --dist worksteal -m long

# Tests that run kernels, with memory of the CPU playing a GPU's: what is forgotten on the other side shows. What compiles
# is left out, because torch.compile can't see through the stand-in. See tests/stand_in.py.
test-as-gpu: $(INSTALLED)
	OMP_NUM_THREADS=1 FASTBERT_STAND_IN=1 .venv/bin/pytest -n auto --dist worksteal -m 'kernels and not long' -k 'not compil'

# transformers' own tests of its models, asked of accelerated ones: FOLDER is a checkout of it at the installed version,
# FAMILIES are by default all. Takes half an hour; see tests/transformers_tests.py.
test-transformers: $(INSTALLED)
	.venv/bin/python -m pip install --disable-pip-version-check parameterized httpx
	.venv/bin/python tests/transformers_tests.py $(or $(FOLDER),$(error FOLDER: a checkout of transformers)) $(FAMILIES)

# The service in examples/serving, with clients of others, none of which `make` installs.
test-serving: $(INSTALLED)
	.venv/bin/python -m pip install --disable-pip-version-check '$(TORCH)' -e '.[hf,serving]' \
	  openai langchain-openai llama-index-embeddings-openai llama-index-embeddings-text-embeddings-inference
	OMP_NUM_THREADS=1 .venv/bin/pytest tests/test_serving.py -m 'long or not long'

# What somebody does who has only the README: our wheel in a fresh environment, its snippets, the examples, a bench.
newcomer: $(INSTALLED)
	.venv/bin/python tests/newcomer.py '$(TORCH)'

# Draw arguments and states of torch for the public API, others each time, for so many minutes; see tests/test_fuzz.py.
fuzz: $(INSTALLED)
	@end=$$(( $$(date +%s) + 60 * $(MINUTES) )); while [ $$(date +%s) -lt $$end ]; do \
	  FASTBERT_CHECK=1 FASTBERT_FUZZ_EXAMPLES=200 $(LANE) .venv/bin/pytest -q tests/test_fuzz.py \
	    --hypothesis-seed=$$(date +%s) || exit 1; done

# Lint, format, types.
check: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	rm -rf build/typed
	mkdir -p build/typed
	cp -R fastbert build/typed
	rm build/typed/fastbert/kernels.py
	cp -R kernels build/typed/fastbert
	.venv/bin/mypy

# The site, into build/site; a warning ends it. The variable turns off a notice of mkdocs-material's about its successor.
docs: $(INSTALLED)-docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

# Pictures of its pages by Chromium (Debian's package chromium, say), into build/shots, to be looked at.
docs-shot: docs
	.venv/bin/python docs/shots.py

# Compile every launch choice for every GPU we know, without one.
static: $(INSTALLED)
	.venv/bin/pytest -m static

# Hold static evidence and the speed on this CPU against benchmarks/baselines. `make gate UPDATE=1` takes new evidence
# over, `make gate BASE=main` also compares the speed with that of a commit.
gate: $(INSTALLED)
	.venv/bin/python benchmarks/gate.py $(if $(UPDATE),--update) $(if $(BASE),--base $(BASE))

# Against every rival that installs on a CPU; `.venv/bin/pytest benchmarks` takes those that are there.
bench: $(INSTALLED)-rivals
	.venv/bin/pytest benchmarks

# On a machine with a GPU: correctness, tuning, all benchmarks, report. See docs/benchmarks.md.
gpu: $(INSTALLED)-rivals
	.venv/bin/python benchmarks/gpu.py

# What was measured, as tables and pictures in docs/performance.md and README.md.
report: $(INSTALLED)
	.venv/bin/python benchmarks/report.py

clean:
	rm -rf .venv build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache

# torch is named in the one command that installs everything, so that nothing else pulls another build of it. Ours was
# called fastbert once; an editable install under that name would stay beside the new one.
$(INSTALLED): pyproject.toml setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'fastbert needs Python 3.10 or later, and "$(PYTHON)" is not. Say which to use: make test PYTHON=python3.12'; exit 1; }
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	rm -f .venv/installed-*
	.venv/bin/python -m pip uninstall --yes -qq fastbert
	.venv/bin/python -m pip install --upgrade --disable-pip-version-check '$(TORCH)' '$(TRITON); platform_system == "Linux"' -e '.[dev]'
	touch '$@'

# torch is named again, so that no rival changes it.
$(INSTALLED)-rivals: $(INSTALLED)
	.venv/bin/python -m pip install --disable-pip-version-check '$(TORCH)' '$(TRITON); platform_system == "Linux"' -e '.[dev,bench]'
	touch '$@'

$(INSTALLED)-docs: $(INSTALLED)
	.venv/bin/python -m pip install --disable-pip-version-check '$(TORCH)' '$(TRITON); platform_system == "Linux"' -e '.[dev,docs]'
	touch '$@'
