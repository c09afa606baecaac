"""The version, which every plan records."""

__version__ = "0.1.0"
