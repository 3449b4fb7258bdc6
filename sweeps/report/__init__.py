"""Reports a sweep as a page: `python -m sweeps.report FOLDER`.

Data flows through read.py (files -> runs), collect.py and settings.py (runs that differ only in the
seed), compare.py and equivalent.py (differences, gains), figures.py with lines.py and training.py
(drawn by chart.py), tables.py and findings.py, to page.py and events.py. texts.yaml and the
templates have the words. The report trains nothing and writes nothing into a run's folder.
"""

from mtp_lightning.errors import require_package


def require_packages(what: str) -> None:
    """Check that the packages of the extra ``report`` are installed, which ``what`` needs.

    Raises:
        UserError: one is missing.
    """
    for name in ("matplotlib", "jinja2", "scipy"):
        require_package(name, what=what, extra="report")
