"""``mtp-lightning heads MODEL``: heads for a finished model, in one command.

``timing.py`` measures the machine, ``planning.py`` divides the hours, and ``phases.py`` runs the
phases, each by the app that does it alone: train, certify, export. A folder keeps the plan and what
every phase left, so that the same command continues where it was stopped.

This folder is optional: the core does not import it.
"""
