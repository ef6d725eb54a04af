"""What both sides of the federation share: the method and the contracts."""

__version__ = "0.1.0"
