# Every target sets up what it needs: a virtual environment, a CPU torch first, then the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# the environment leaves CUDA kernels out, which take nvcc minutes: 1 builds them, `make wheel` always
FASTCL_BUILD_CUDA ?= 0
# a test process per core; tests take one thread each
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal
# the generated matrix of backends is long through the interpreter: see test-triton-full
TRITON_TESTS := tests/kernels tests/ops/test_backends.py \
	-k "triton and not (test_shapes or test_rules or test_data or test_several)"

.PHONY: demo test test-methods test-peers test-triton-full test-hostile test-mining-full docs \
	dev lint lint-kernels lint-cuda bench gpu wheel test-wheel clean

demo: $(VENV)/.ready  ## train SimCLR on handwritten digits, three seeds, with table and pictures
	$(BIN)/fastcl train simclr --seeds 0 1 2 --out $(or $(OUT),runs/demo) --overwrite

test: $(VENV)/.ready  ## the whole test suite, with coverage; Triton kernels through the interpreter
	$(BIN)/pytest $(PARALLEL) --cov=fastcl --cov-report=term
	TRITON_INTERPRET=1 $(BIN)/pytest $(PARALLEL) $(TRITON_TESTS)  # coverage would double its time

# both ends of the supported range; the interpreter of 3.6 knows numpy up to 2.3
TRITONS := 3.6.0 3.9.0
build/triton-%: $(VENV)/.ready
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target $@ triton==$* "numpy<2.4"

test-methods: $(VENV)/.ready  ## every method of `fastcl train` learns, three seeds each (long)
	$(BIN)/python tests/train/bars.py

test-triton-full: $(TRITONS:%=build/triton-%)  ## every backend test through the interpreter (long)
	for path in $^; do TRITON_INTERPRET=1 PYTHONPATH=$$path $(BIN)/pytest tests/kernels \
		tests/ops/test_backends.py -k triton || exit 1; done

test-mining-full: $(VENV)/.ready  ## memory of the mining losses at 8192 rows (long)
	FASTCL_MINING_ROWS=8192 $(BIN)/pytest tests/losses/test_margin.py -k no_matrix

lint-kernels: $(TRITONS:%=build/triton-%)  ## compile every launch for sm_80 and sm_90 and check it (long)
	for path in $^; do PYTHONPATH=$$path $(BIN)/python tests/kernels/lint.py || exit 1; done

lint-cuda: build/wheel-tools  ## compile every CUDA kernel for sm_80, sm_90a and sm_100a and check it
	PYTHONPATH=$< $(BIN)/python tests/cuda/lint.py

test-hostile: $(VENV)/.ready  ## thousands of drawn problems, new ones every time (long)
	FASTCL_HOSTILE_EXAMPLES=$(or $(EXAMPLES),3000) $(BIN)/pytest tests/losses/test_hostile.py

docs: $(VENV)/.ready  ## build/site: guides and the reference from docstrings, links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # with -q it counts no warnings

# A CUDA build of torch, because torchvision's imports with no other; "===" leaves local builds such
# as +cpu aside. fastcl is linked in, so that the checkout's folder `kernels` stays off the path.
PEERS_VENV := build/peers
$(PEERS_VENV)/.ready:
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install -q --disable-pip-version-check "torch===2.13.0" torchvision
	$(PEERS_VENV)/bin/pip install -q --disable-pip-version-check lightly pytorch-metric-learning \
		open_clip_torch "sentence-transformers[train]>=6.2" info-nce-pytorch lightning pytest \
		pytest-mock
	ln -sfn $(CURDIR)/fastcl $$($(PEERS_VENV)/bin/python -c \
		"import site; print(site.getsitepackages()[0])")/fastcl
	touch $@

test-peers: $(PEERS_VENV)/.ready  ## beside the installed libraries (5 GB); their own tests from PEERS=folder of checkouts
	FASTCL_PEERS=$(abspath $(or $(PEERS),build/checkouts)) HF_HUB_OFFLINE=1 \
		$(PEERS_VENV)/bin/pytest tests/peers

lint: $(VENV)/.ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready  ## time, memory and error beside plain PyTorch on this machine
	$(BIN)/python -m benchmarks

gpu:  ## correctness and speed on this machine's CUDA GPU, with the torch and Triton that it has
	$(PYTHON) -m benchmarks.gpu --out $(or $(OUT),runs/gpu)

dev: $(VENV)/.ready  ## the environment only

wheel: $(VENV)/.ready  ## dist/*.whl with both native modules, and an sdist; needs nvcc, no GPU
	rm -rf dist
	FASTCL_BUILD_CPU=1 FASTCL_BUILD_CUDA=1 $(BIN)/pip wheel --no-build-isolation --no-deps -q -w dist .
	FASTCL_BUILD_CPU=0 FASTCL_BUILD_CUDA=0 $(BIN)/python setup.py -q sdist

build/wheel-tools: $(VENV)/.ready
	$(BIN)/pip install -q --disable-pip-version-check --target $@ abi3audit nvidia-cuda-cuobjdump \
		nvidia-cuda-nvdisasm

# the newest of these brings CUDA libraries of 5 GB with it
WHEEL_TORCH ?= torch==2.13.0 torch==2.14.1
test-wheel: wheel build/wheel-tools  ## install the wheel beside several torches, in fresh places
	PYTHONPATH=build/wheel-tools $(BIN)/python tests/wheel.py dist/*.whl --sdist dist/*.tar.gz \
		--torch $(WHEEL_TORCH) --python $$(command -v $(PYTHON))

# torch comes first and alone, so that nothing later pulls a CUDA build of it
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	touch $@

CSRC := $(wildcard csrc/cpu/* $(if $(filter-out 0,$(FASTCL_BUILD_CUDA)),csrc/cuda/*))
$(VENV)/.ready: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	$(BIN)/pip install -q --disable-pip-version-check "setuptools>=77" wheel ninja
	FASTCL_BUILD_CUDA=$(FASTCL_BUILD_CUDA) $(BIN)/pip install -q --disable-pip-version-check \
		--no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info fastcl/*.abi3.so fastcl/_build_info.json
