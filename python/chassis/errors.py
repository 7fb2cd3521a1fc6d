"""Errors meant for the user: the command line prints their message and no traceback."""


class ChassisError(ValueError):
    """Something the caller can put right: the message says what was given, what was expected and what to do."""


class DataError(ChassisError):
    """The text to read is missing, empty, damaged or of a kind that is not understood."""


class ModelError(ChassisError):
    """The model cannot be found, cannot be loaded safely, or is not built as the work at hand needs."""
