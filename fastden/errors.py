"""The error that a command shows as one line."""


class UserError(Exception):
    """A mistake that the user can mend: the message names the argument, the value and what is accepted."""
