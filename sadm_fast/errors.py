"""The one exception that means: the person at the terminal has something to change."""


class UserError(Exception):
    """A one-line message that names the thing, its value and the remedy; entry points print it and exit with 2."""
