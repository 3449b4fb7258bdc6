"""The ways of predicting several tokens, one a file, behind the interface of ``base``."""
