"""Many runs: what to vary (the YAML files), what runs them (launchers, search), what came of them.

Talks to runs through their files and the command line only; see docs/sweeps.md.
"""
