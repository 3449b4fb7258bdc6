"""The one place that turns a config into objects, and runs them.

The way through a run: config -> data -> model -> module -> trainer -> summary.
"""
