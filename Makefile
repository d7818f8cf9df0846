# make demo: from nothing to generated videos, on synthetic clips.  make test: the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test format clean

demo: $(VENV)/.installed
	$(BIN)/python resize.py --synthetic --out demo/resized_data
	$(BIN)/python main.py --batch-size 4 --epochs 300 --sample-every 100 --data demo/resized_data \
		--models demo/trained_models --videos demo/generated_videos
	@echo "Open demo/generated_videos/index.html in a browser: generated and real videos."

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@
