"""Reports a sweep as a page: `python -m sweeps.report FOLDER`.

Data flows through read.py (files -> runs), collect.py and settings.py (runs that differ only in the
seed), compare.py and equivalent.py (differences, gains), figures.py (drawn by chart.py), tables.py
and findings.py, to page.py and events.py. The report trains nothing and writes nothing into a run's
folder.
"""
