"""A teacher on disk: what it said, written once, read in any order by any number of processes.

`format.py` says what a folder has, `codec.py` how far what is read may be from what was given.
"""

from ..files import CacheError
from ..pairs import Paired, collate
from ..views import Views
from .capture import capture, share
from .codec import logit_bound, logprob_bound
from .format import merge
from .reader import Reader
from .writer import Writer

__all__ = ["CacheError", "Paired", "Reader", "Views", "Writer", "capture", "collate"]
__all__ += ["logit_bound", "logprob_bound", "merge", "share"]
