"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """The user's input is wrong: printed as one line, without a traceback, exit code 2.

    The message names the file, key or tensor, what was found, what was expected and what to do.
    """
