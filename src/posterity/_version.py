"""The version of the package, for modules that must not import the package's public face."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("posterity")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "unknown"
