"""The error classes whose text is for the user: one line, without a traceback."""


class UserError(Exception):
    """A mistake of the user, in one line: what is wrong, with the value; what is allowed; what to do."""


class LostRunError(Exception):
    """Another process has continued or completed the run of this process, which must not write any more."""
