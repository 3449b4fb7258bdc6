"""The files of a run, once: what they are called, how they are written, found and read.

Runs, sweeps and reports meet here and nowhere else. ``checkpoints`` and ``loading`` need torch, the
others nothing that is slow to import.
"""
