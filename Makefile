# make demo   a language model distilled on real text, each way beside torch's own loss
# make check  for every save: lint, types and the two minutes of tests that catch most
# make test   everything that is checked: lint, types, sdist, tests on every backend, toy benchmark
# make docs   the documents and the reference as pages: build/docs/index.html
# make kernels, sanitize, aarch64: the C++ kernels alone, see below
# make served beside real servers that run teachers, where they are installed
# make ptx    the Triton kernels' PTX, executed without a GPU
# make hub    the losses in the layout of Hugging Face's kernels
# make gpu    on a machine with a GPU and its own torch and triton: build, test, measure
#
# An interrupted demo goes on where it was; `rm -r demo` begins anew. demo/demo.html shows the result.
# demo and test make their own environment in .venv; PYTHON and TORCH choose what goes into it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
RESULTS ?= bench/results
# of the property tests; SEED= draws another one for every run
SEED ?= 1

# of the demonstration: a text file or a folder of them (none: Python's own sources), and its sizes:
# tiny, small or gpu, each in a folder of its own
TEXT ?=
PRESET ?= small
# over how many seeds its gain is measured
SEEDS ?= 1

# Here, the C++ kernels must build, and a test of them must not be skipped; a user's build goes on
# without them.
export FASTKD_REQUIRE_CPU ?= 1

# The tests start many processes; without byte code each would compile what it imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo record-demo check test pytest lint sdist docs wheels cross kernels sanitize aarch64 served ptx hub gpu clean
.DELETE_ON_ERROR:

# It needs less than the tests do: where these have no environment yet, it makes a smaller one.
demo: $(if $(wildcard $(VENV)/ready),$(VENV)/ready,$(VENV)/demo)
	$(RUN) -m fastkd demo $(TEXT) --preset $(PRESET) --seeds $(SEEDS) \
	  --out demo$(if $(filter-out small,$(PRESET)),-$(PRESET))

$(VENV)/demo: pyproject.toml setup.py $(wildcard csrc/*)
	@echo "first: $(TORCH), transformers and the compiled kernels go to $(VENV), a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet --editable ".[demo]"
	touch $@

# The default size over three seeds, for bench/results and the README of fastkd/demo.
record-demo: $(VENV)/ready
	$(RUN) -m fastkd demo --seeds 3 --out build/demo --fresh
	$(RUN) -m bench.demo build/demo

# Every formula, option, dtype and edge of the core on the CPU's kernels and on the reference; not
# Triton's interpreter, other processes, compiled steps or whole trainings (tests/README.md).
CHECK = tests/losses/test_losses.py tests/losses/test_options.py tests/losses/test_weights.py \
  tests/losses/test_edges.py tests/engine/test_autograd.py tests/losses/test_inplace.py \
  tests/losses/test_strides.py tests/losses/test_linear.py tests/losses/test_topk.py \
  tests/losses/test_topk_refused.py tests/losses/test_divergence.py tests/losses/test_errors.py \
  tests/losses/test_widths.py tests/losses/test_conventions.py tests/package/test_layers.py \
  tests/distill/test_distill.py tests/distill/test_responses.py

check: $(VENV)/ready lint
	$(RUN) -m pytest -n auto --maxprocesses 8 -x $(CHECK) -k "not gpu"

# Lint and the sdist, each one's output in one piece, beside the tests: each of the three waits now
# and then, for a download, for another process, or, one worker left, for its last test.
test: $(VENV)/ready
	$(MAKE) -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) lint sdist & \
	  $(MAKE) pytest; tests=$$?; \
	  wait $$! || { echo "lint or the sdist has failed, see above"; exit 1; }; exit $$tests

# One line a minute says where the tests are. pytest would rewrite all modules of the plugins that it
# finds, in each worker: Hypothesis's needs none to run.
pytest: $(VENV)/ready
	FASTKD_TEST_SEED=$(SEED) FASTKD_TEST_PROGRESS=60 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
	  $(RUN) -m pytest -p xdist -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The kernels' own test binary (tests/kernels): against the definitions, every buffer between pages
# that may not be touched, as shipped and under the address and undefined-behaviour sanitizers.
# SECONDS=3600 fuzzes for an hour; a failing case prints its number, and `check case N` repeats it.
SECONDS ?= 20
FUZZ_SEED ?= $(shell date +%s)
KERNELS = $(RUN) tests/kernels/binary.py --seed $(FUZZ_SEED)
CLANG := $(if $(shell command -v clang++),clang)

kernels: $(VENV)/ready
	$(KERNELS) --fuzz 10 native $(CLANG)

sanitize: $(VENV)/ready
	$(KERNELS) --fuzz $(SECONDS) sanitize

# Cross-compiled and run under qemu; writes tests/kernels/aarch64.json, which says when it passed.
aarch64: $(VENV)/ready
	$(KERNELS) --fuzz $(SECONDS) aarch64

# Compiled, not run, for macOS and Windows by Zig's compiler (pip install ziglang).
cross: $(VENV)/ready
	$(RUN) -m pip install --quiet ziglang
	$(RUN) tests/kernels/cross.py

# The release's files in dist/ for each interpreter in PYTHONS, every wheel installed in a bare
# environment, where the first example of README.md runs if the environment has torch.
PYTHONS ?= $(PYTHON)
wheels: $(VENV)/ready
	$(RUN) tests/wheels.py $(PYTHONS)

# vLLM, llama-server and llama-cpp-python (FASTKD_VLLM, FASTKD_LLAMA: their Pythons) beside
# transformers; writes tests/teachers/served.json.
served: $(VENV)/ready
	$(RUN) tests/teachers/real_servers.py

# The Triton kernels as PTX, executed here: every case on one of sm_80, sm_90 and sm_100, every pair
# of values on each, up to an hour; writes tests/ptx/record.json, which says when it passed. A call
# goes on where the last one ended; PTX_MINUTES=20 ends after so many.
ptx: $(VENV)/ready
	$(RUN) tests/ptx/record.py $(addprefix --minutes ,$(PTX_MINUTES))

# The losses as a kernel in Hugging Face's format, in build/hub: pure Python, for any GPU.
hub: $(VENV)/ready
	$(RUN) tests/hub_kernel.py build/hub

# The package as a user gets it: sdist, the wheel built from it, and that wheel in an environment of
# its own, where the checkout cannot be found.
sdist: $(VENV)/ready
	$(RUN) tests/sdist.py

# The READMEs and the reference of the public modules as pages in build/docs; a dead link fails.
docs: $(VENV)/ready
	$(RUN) tests/docs.py

# Warnings are errors here, where the compiler is known, and not in a user's build. All that is
# downloaded is installed while it compiles. Byte code: of all these packages it takes minutes, and
# a fraction of them is imported. One process compiles it, before each worker would by itself; what
# it cannot collect, the tests will say.
$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) tests/requirements.py dev gpu > $(VENV)/requirements.txt
	CXXFLAGS="-Wall -Wextra -Werror" $(RUN) -m pip install --quiet --no-deps --editable . & \
	  $(RUN) -m pip install --quiet --no-compile "$(TORCH)" -r $(VENV)/requirements.txt && \
	  { PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(RUN) -m pytest --collect-only -qq > $(VENV)/collected.txt 2>&1 || true; } && wait $$!
	touch $@

# Nothing is downloaded: what the machine has is used, and the folder is built in place. As it stands
# it fits 13 minutes, and goes on when called again; GPU_MINUTES=9 fits nine. GPU_SHAPES="" measures
# the whole grid, GPU_SHAPES=64x128256,... it on those.
GPU_MINUTES ?= 13
GPU_SHAPES ?= fit
# LINEAR_SHAPES=gpu,gpu-sweep draws the linear losses against rows and vocabulary
LINEAR_SHAPES ?= gpu
gpu:
	$(PYTHON) -m bench.gpu --results $(RESULTS) --minutes $(GPU_MINUTES) \
	  --shapes "$(GPU_SHAPES)" --linear $(LINEAR_SHAPES)

# Faults, one at a time, in a copy of the tree: does the suite notice? See tests/mutants/README.md.
# AREA= one of csrc, python, triton, parallel
JOBS ?= 2
.PHONY: mutants
mutants: $(VENV)/ready
	$(RUN) tests/mutants/run.py -j $(JOBS) $(addprefix --area ,$(AREA)) --json build/mutants.json

clean:
	rm -rf $(VENV) build dist demo demo-* *.egg-info fastkd/*.so
