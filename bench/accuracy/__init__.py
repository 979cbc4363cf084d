"""Accuracy of fastkd's losses beside plain torch's: `python -m bench.accuracy --help`."""
