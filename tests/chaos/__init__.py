"""Faults on purpose: kills, full disks, bad input, hostile files, and what a machine does wrong.

    python -m tests.chaos --minutes 30

tries as many cases as fit, in an order that the seed decides, and says what held.
"""
