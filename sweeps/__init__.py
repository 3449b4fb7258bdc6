"""Many runs: launchers and search, which start them, claims about them, and their report.

This package talks to runs only through their files and the command line; see docs/sweeps.md.
"""
