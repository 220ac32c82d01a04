"""The one exception that means: the person at the terminal has something to change."""


class UserError(Exception):
    """A one-line message that names the thing, its value and the remedy; entry points print it and exit with 2.

    Of what every rank finds wrong only rank 0 speaks, unless `on_every_rank`.
    """

    def __init__(self, message: str, *, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank
