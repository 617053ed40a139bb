"""The version of the package, alone, so that everything can import it."""

__version__ = "0.1.0"
