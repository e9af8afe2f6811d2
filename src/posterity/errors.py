"""The one exception a user is meant to see: what was expected, what came, what to do, in one line."""


class InputError(ValueError):
    """Raised at the public edge for anything the user can mend; the command line prints it without a traceback."""
