"""How a loss is run: from the checked arguments to the passes of a backend."""
