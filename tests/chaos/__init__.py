"""Fault injection: kills, full disks, bad input, hostile files and faults of the machine.

    python -m tests.chaos --minutes 30

tries as many cases as fit, in an order that the seed decides, and prints each result.
"""
