"""Many runs: what to vary (the YAML files), who runs them (launchers, search), what came out (report).

Talks to runs through their files and the command line only; see docs/sweeps.md.
"""
