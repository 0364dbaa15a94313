"""The one exception that reaches a user as a single line."""


class UserError(Exception):
    """Something the user can put right: says what is wrong, where, and what to do."""
