"""The one error that a user can cause."""


class UserError(Exception):
    """A mistake of the user's, told in one line: what is wrong, with the value; what is allowed; what to do."""
