"""The one exception for what a user can mend: a setting, a file, a folder, a missing package."""


class UserError(ValueError):
    """Wrong or missing input. Its text says what was expected, what was found, where, and what to do.

    The command lines print it as one line (`utils.engine.session.run_command`). Any other exception is a bug of ours and keeps
    its traceback, so code that checks its own invariants raises plain ValueError.
    """


class MissingFileError(UserError):
    """A file that a list or a setting names is not there."""


class MissingLabelsError(UserError):
    """A data set has no test lists, or lists without a label column: it can be trained on, not evaluated."""
