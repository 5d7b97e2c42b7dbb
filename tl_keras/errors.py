"""The error class for mistakes of the user."""


class UserError(Exception):
    """A mistake of the user, in one line: what is wrong, with the value; what is allowed; what to do."""
