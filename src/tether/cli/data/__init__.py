"""`tether data`: what rows hold and how they become tokens."""

from tether.cli.data.commands import app

__all__ = ["app"]
