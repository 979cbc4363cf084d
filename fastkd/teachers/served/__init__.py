"""A teacher behind a server: `Served`; the README of the folder above says how to use it."""

from .teacher import Served

__all__ = ["Served"]
