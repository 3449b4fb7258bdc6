"""How far back a model looks: see docs/long_range.md."""
