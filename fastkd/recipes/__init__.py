"""One runnable demonstration per method, each beside its control: python -m fastkd.recipes.NAME."""

RECIPES = {"digits": "soft targets carry a wide teacher's labels into a small student"}

__all__ = ["RECIPES"]
