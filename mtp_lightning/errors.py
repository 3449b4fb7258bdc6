"""The error for mistakes that a user can fix."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong setting, file or folder. The message is one sentence with the value and the remedy.

    The apps print the sentence and exit with code 1. Other errors keep their traceback.
    """
