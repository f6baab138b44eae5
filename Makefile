# make demo: the main job. make test: the tests. Each sets up a virtual environment with pip first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# e2cnn's and escnn's lie_learn is built for numpy 1; escnn names py3nj, which needs a Fortran compiler and nothing here.
PEERS := numpy==1.26.4 e2cnn==0.2.3 e3nn==0.6.0 lie_learn==0.0.2 pymanopt==2.2.1 autograd==1.9.1 requests scikit-image==0.26.0

.PHONY: demo test test-zoo test-peers bench bench-peers stress lint types clean

demo: $(VENV)/.ready
	$(BIN)/geomssl demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# torchvision and timm: the comparison of the transforms and the adapters, in an environment of its own.
test-zoo: .venv-zoo/.ready
	.venv-zoo/bin/python -m pytest -m zoo tests/zoo

# e2cnn, escnn and e3nn: the instrument against their own transforms, in an environment of its own.
test-peers: .venv-peers/.ready
	OMP_NUM_THREADS=1 .venv-peers/bin/python -m pytest -m peers tests/peers

# Ratios against e2cnn and escnn, in that environment.
bench-peers: .venv-peers/.ready
	.venv-peers/bin/python benchmarks/run.py peers

# Ratios against peers, in an environment of its own: make bench NAMES="views group_conv"
bench: .venv-bench/.ready
	.venv-bench/bin/python benchmarks/run.py $(NAMES)

# Kills at random moments of training and probing.
stress: $(VENV)/.ready
	$(BIN)/python tests/stress/faults.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("geomssl needs Python 3.11 or newer; %s is %d.%d: set PYTHON=python3.11" % (sys.executable, v[0], v[1]))'
	@echo "setting up $(VENV): downloads PyTorch and what it needs, some minutes the first time"
	@$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m pip install --quiet --user virtualenv && $(PYTHON) -m virtualenv --quiet $(VENV); }
	$(PIP) --editable '.[test,dev]'
	@touch $@

.venv-zoo/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-zoo || { $(PYTHON) -m pip install --quiet --user virtualenv && $(PYTHON) -m virtualenv --quiet .venv-zoo; }
	.venv-zoo/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[test]'
	.venv-zoo/bin/python -m pip --disable-pip-version-check install --quiet --no-deps torchvision==0.28.0
	.venv-zoo/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt timm
	@touch $@

.venv-peers/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-peers || { $(PYTHON) -m pip install --quiet --user virtualenv && $(PYTHON) -m virtualenv --quiet .venv-peers; }
	grep -v '^numpy==' constraints.txt > .venv-peers/constraints.txt
	.venv-peers/bin/python -m pip --disable-pip-version-check install --quiet --constraint .venv-peers/constraints.txt --editable '.[test]' $(PEERS)
	.venv-peers/bin/python -m pip --disable-pip-version-check install --quiet --no-deps escnn==1.0.11
	@touch $@

.venv-bench/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench || { $(PYTHON) -m pip install --quiet --user virtualenv && $(PYTHON) -m virtualenv --quiet .venv-bench; }
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable . kornia==0.9.0
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet --no-deps torchvision==0.28.0 grad-cam==1.5.7 ttach==0.0.3 opencv-python-headless==5.0.0.93
	@touch $@

clean:
	rm -rf .venv .venv-zoo .venv-peers .venv-bench build dist *.egg-info demo
