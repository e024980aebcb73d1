"""The one exception a user should ever see: it says what is wrong, where, and how to mend it."""


class UserError(Exception):
    """A mistake or an accident outside the code; stages print its text as one paragraph and exit 1."""
