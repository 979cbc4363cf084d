"""Other tools' files and servers' answers as `TopK` teachers, and back; see the README's table.

for record in (reading := formats.read("vllm", answer, tokens=ids, vocab_size=V)):
    loss = fastkd.kl_div(logits[record.teaches - 1], record.topk, labels=record.labels())
print(reading.report)
formats.write("distillkit", records, folder)
"""

from .records import Record, Report
from .table import Format, Reading, formats, read, write

__all__ = ["Format", "Reading", "Record", "Report", "formats", "read", "write"]
