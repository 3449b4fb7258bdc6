.PHONY: test lint types checks

test:
	python -m pytest

lint:
	ruff check .
	ruff format --check .

types:
	mypy

checks: lint types test
