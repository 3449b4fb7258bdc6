"""Multi-token prediction: train, balance, draft, compare.

In a notebook: ``from mtp_lightning import train, evaluate, generate, sweep``
(:mod:`mtp_lightning.notebook`).
"""


def __getattr__(name: str) -> object:
    # Imported when asked for: the tools that import this package do not wait for it.
    from mtp_lightning.parts import on_demand

    return on_demand(__name__)(name)


def __dir__() -> list[str]:
    from mtp_lightning.parts import homes

    return sorted([*globals(), *homes(__name__)])
