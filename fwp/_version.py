"""The version, in a file that every other may import."""

__version__ = "0.1.0"
