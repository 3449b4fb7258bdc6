"""A sweep as a page: `python -m sweeps.report FOLDER`.

The way of the data: read.py (files -> runs) -> collect.py, settings.py (runs that differ in the
seed alone) -> compare.py, equivalent.py (differences, gains) -> figures.py, tables.py, findings.py
-> page.py, events.py. Nothing here trains, and nothing is written into a run's own folder.
"""
