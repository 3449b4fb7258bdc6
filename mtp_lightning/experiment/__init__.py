"""Turns a config into objects, and runs them: config -> data -> model -> module -> trainer ->
summary."""
