"""Many runs: what varies (the YAML files), what runs them (launchers, search), and their results.

This package talks to runs only through their files and the command line; see docs/sweeps.md.
"""
