"""Plug any language model into yours: lenses, adapters and bridges fitted in one streaming pass over text."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("chassis-kernels")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["__version__"]
