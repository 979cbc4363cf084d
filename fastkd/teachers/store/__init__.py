"""A teacher on disk: what it said, written once, read in any order by any number of processes.

    cache.capture(teacher, loader, path, vocab_size=V, k=32, tokenizer=tokenizer)
    reader = cache.Reader(path, vocab_size=V, tokenizer=tokenizer)
    DataLoader(cache.Paired(dataset, reader), batch_size=8, collate_fn=cache.collate, num_workers=2)

Many ranks write one cache at once, and each reads its own part:

    cache.capture(teacher, loader, path, vocab_size=V, k=32, rank=r, world_size=n)
    cache.merge(path)
    DataLoader(pairs, sampler=cache.ShardSampler(reader, rank=r, world_size=n), ...)

A folder of safetensors shards and JSON indexes (see `store.format`), of `TopK` teachers or, for
classifiers, of all logits. A token of k = 32 at V = 128 256 takes 106 bytes: 68 of indices of 17
bits, 32 of log-probabilities, 4 of the row's level, 2 of log(1 - sum p). The row's mass is kept to
rounding; a log-probability `gap` nats below the row's largest is within

    "uint8"    0.0109 * (1 + gap + log k)       for gaps up to 128
    "float16"  2**-11 * (gap + log k + 2**-13)
    "counts"   0: draws of a sampled teacher, as they are

of what was given (plus 2**-22 of its size), log(1 - sum p) within 2**-11 of its size; see
`store.codec`. An 8-bit cache so costs a loss some 1e-5 to 1e-4 nats a row.
"""

from .assignment import share
from .capture import capture
from .codec import logprob_bound
from .format import CacheError
from .loader import Paired, collate
from .merged_index import merge
from .reader import Reader
from .sampler import ShardSampler
from .writer import Writer

__all__ = [
    "CacheError",
    "Paired",
    "Reader",
    "ShardSampler",
    "Writer",
    "capture",
    "collate",
    "logprob_bound",
    "merge",
    "share",
]
