"""One runnable demonstration per method, each beside its control: python -m fastkd recipes.

The first of them, `python -m fastkd.recipes.digits`, also draws its curves (see `digits`).
"""

from .recipe import Figures, Gain, Recipe
from .runner import known, run

__all__ = ["Figures", "Gain", "Recipe", "known", "run"]
