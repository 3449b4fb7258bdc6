"""What a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A setting, a file or a folder that is wrong: one sentence with the value and the remedy.

    The apps show the sentence and exit with code 1; any other error keeps its traceback.
    """
