.PHONY: test lint types checks site notebook image

test:
	python -m pytest

lint:
	ruff check .
	ruff format --check .

types:
	mypy

checks: lint types test

# The documentation, in site/index.html; pip install -e '.[docs]'
site:
	NO_MKDOCS_2_WARNING=1 mkdocs build --site-dir site

# docs/tutorial/notebook.ipynb, executed anew in a folder of its own
notebook:
	cd $$(mktemp -d) && jupyter execute --inplace $(CURDIR)/docs/tutorial/notebook.ipynb

# A container for CPUs; TORCH=cuda for GPUs
TORCH ?= cpu
image:
	docker build --build-arg TORCH=$(TORCH) -t mtp-lightning:$(TORCH) .
