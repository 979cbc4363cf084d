"""One runnable demonstration per method, each beside its control: python -m fastkd recipes."""

from .recipe import Figures, Gain, Recipe
from .runner import known, run

__all__ = ["Figures", "Gain", "Recipe", "known", "run"]
