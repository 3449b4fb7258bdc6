"""The ways of predicting several tokens: one file per variant, with the interface of ``base``."""
