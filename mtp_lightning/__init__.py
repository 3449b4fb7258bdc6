"""Multi-token prediction: train, balance, draft, compare.

In a notebook: ``from mtp_lightning import train, evaluate, generate, sweep``
(:mod:`mtp_lightning.notebook`).
"""

_NOTEBOOK = ("Run", "Sweep", "Text", "evaluate", "generate", "sweep", "train")


def __getattr__(name: str) -> object:
    # Imported when asked for: the tools that import this package do not wait for it.
    if name in _NOTEBOOK:
        from mtp_lightning import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NOTEBOOK])
