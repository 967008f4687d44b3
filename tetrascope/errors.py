"""The one exception that means "the user can fix this": shown as a single message, exit code 2, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: a config field, a file, a layout or a checkpoint that cannot be used.

    The message names the file or field, what was expected and what to do about it. The command line prints it
    without a traceback and exits with code 2; a rank that raises it in mid-training adds its rank.
    """
