"""The one error type that means "the user can mend this"."""


class UserError(ValueError):
    """A refusal of the user's input: one line that says what was wrong, where, and the next step.

    The command line prints it without a stack trace and exits with code 2.
    """
