"""The losses of the workflow beside the divergences, as functions and as terms of a run."""
