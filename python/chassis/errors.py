"""Errors meant for the user: the command line prints their message and no traceback."""


class ChassisError(ValueError):
    """Something the caller can put right: the message says what was given, what was expected and what to do."""


class DataError(ChassisError):
    """The text to read is missing, empty, damaged or of a kind that is not understood."""


class ModelError(ChassisError):
    """The model cannot be found, cannot be loaded safely, or is not built as the work at hand needs."""


class TokenizerError(ChassisError):
    """The tokenizer cannot be read as bytes, or does not give back the text it was given."""


class BridgeError(ChassisError):
    """The bridge does not fit the tokenizers, or the text to build it from does not suffice."""
