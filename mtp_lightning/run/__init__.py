"""The files of a run: their names, and how they are written, found and read.

Runs, sweeps and reports share these files and no other code. ``checkpoints`` and ``loading`` import
torch. The other modules import nothing slow.
"""
