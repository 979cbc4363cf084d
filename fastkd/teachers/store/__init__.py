"""A teacher on disk: what it said, written once, read in any order by any number of processes.

A folder of Arrow IPC streams, which `datasets.load_from_disk` and any Arrow reader open too, of
`TopK` teachers, for classifiers of all logits, or of hidden states beside their head (`hidden.py`
says how far its logits may be off). A token of k = 32 at V = 128 256 takes 106 bytes: 68 of indices
of 17 bits, 32 of log-probabilities, 4 of the row's level, 2 of log(1 - sum p).
The row's mass is kept to rounding; a log-probability `gap` nats below the row's largest is within

    "uint8"    0.0109 * (1 + gap + log k)       for gaps up to 128
    "counts"   0: draws of a sampled teacher, as they are
    "plain"    0 from float32, for any reader; 8 bytes a column

of what was given (plus 2**-22 of its size), log(1 - sum p) within 2**-11 of its size. An 8-bit
cache so costs a loss some 1e-5 to 1e-4 nats a row.
"""

from ..pairs import Paired, collate
from ..views import Views
from .capture import capture, share
from .codec import logprob_bound
from .format import CacheError, merge
from .hidden import logit_bound
from .reader import Reader
from .writer import Writer

__all__ = ["CacheError", "Paired", "Reader", "Views", "Writer", "capture", "collate"]
__all__ += ["logit_bound", "logprob_bound", "merge", "share"]
