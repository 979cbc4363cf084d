"""Teachers that do not run beside the student: what they said, kept where a student finds it."""

from .served import Served

__all__ = ["Served"]
