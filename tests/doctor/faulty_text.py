"""Language models with one planted fault each: {name: (finding, text of its line, script)}."""

from __future__ import annotations

TEXT = """
import torch
from torch import nn
import torch.nn.functional as F
torch.manual_seed(0)
V, S = 13, 9

class LM(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed, self.body = nn.Embedding(V, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, V)
    def forward(self, ids):
        return self.head(self.body(self.embed(ids))[0])

teacher, student = LM(12).eval(), LM(6)
for p in teacher.parameters():
    p.requires_grad_(False)
opt = torch.optim.AdamW(student.parameters(), lr=1e-3)
ids = torch.randint(1, V, (4, S))
"""

FAULTS: dict[str, tuple[str, str, str]] = {
    "shifted twice": (
        "shift",
        "F.cross_entropy",
        TEXT
        + """
data = torch.randint(1, V, (200,))
for step in range(4):
    at = torch.randint(0, 150, (4,))
    x = torch.stack([data[i : i + S] for i in at])
    y = torch.stack([data[i + 1 : i + S + 1] for i in at])
    s, t = student(x), teacher(x)
    soft = F.kl_div(F.log_softmax(s, -1).view(-1, V), F.softmax(t, -1).view(-1, V),
                    reduction="batchmean")
    hard = F.cross_entropy(s[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))
    (soft + hard).backward()
    opt.step()
    opt.zero_grad()
""",
    ),
    "not shifted": (
        "shift",
        "fastkd.distillation_loss",
        TEXT
        + """
import fastkd
for step in range(3):
    loss = fastkd.distillation_loss(student(ids), teacher(ids), ids, temperature=2.0)
    loss.backward()
    opt.step()
    opt.zero_grad(set_to_none=True)
""",
    ),
    "teacher off by one": (
        "shift",
        "F.kl_div",
        TEXT
        + """
def kd(s, t, T=2.0):
    return F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean") * T * T
for step in range(3):
    with torch.no_grad():
        t = teacher(ids)[:, 1:]
    s = student(ids)[:, :-1]
    kd(s.reshape(-1, V), t.reshape(-1, V)).backward()
    opt.step()
    opt.zero_grad()
""",
    ),
    "padding trained on": (
        "mask",
        "F.kl_div",
        TEXT
        + """
PAD = 0
for n, row in zip((9, 6, 4, 3), ids):
    row[n:] = PAD
for step in range(3):
    with torch.no_grad():
        t = teacher(ids)
    loss = F.kl_div(student(ids).log_softmax(-1).flatten(0, 1), t.softmax(-1).flatten(0, 1),
                    reduction="batchmean")
    loss.backward()
    opt.step()
    opt.zero_grad()
""",
    ),
    "padding under a mixture": (
        "mask",
        "F.kl_div",
        TEXT
        + """
for model in (teacher, student):
    model.embed.padding_idx = 0
for n, row in zip((9, 6, 4, 3), ids):
    row[n:] = 0
for step in range(3):
    with torch.no_grad():
        p = teacher(ids).log_softmax(-1)
    q = student(ids).log_softmax(-1)
    m = torch.logsumexp(torch.stack([p, q]) - 0.6931, 0)
    a, b = (F.kl_div(m, x, log_target=True, reduction="batchmean") for x in (p, q))
    loss = a + b
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "prompt trained on": (
        "mask",
        "fastkd.kl_div",
        TEXT
        + """
import fastkd
labels = ids.clone()
labels[:, :5] = -100
for step in range(3):
    with torch.no_grad():
        t = teacher(ids)
    s = student(ids)
    hard = F.cross_entropy(s[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    loss = 0.5 * hard + 0.5 * fastkd.kl_div(s[:, :-1], t[:, :-1])
    loss.backward()
    opt.step()
    opt.zero_grad()
""",
    ),
    "mean of means": (
        "denominator",
        "F.kl_div",
        TEXT
        + """
lengths = [9, 3, 7, 4, 9, 2]
step = 0
for n in lengths * 2:
    x = torch.randint(1, V, (2, n))
    with torch.no_grad():
        t = teacher(x)
    s = student(x)
    loss = F.kl_div(F.log_softmax(s, -1).view(-1, V), F.softmax(t, -1).view(-1, V),
                    reduction="batchmean")
    (loss / 3).backward()
    step += 1
    if step % 3 == 0:
        opt.step()
        opt.zero_grad()
""",
    ),
    "two tokenizers": (
        "tokenizer",
        "F.kl_div",
        TEXT
        + """
text = "the cat sat on the mat and the dog ran"
student_vocab = {c: i for i, c in enumerate(sorted(set(text)))}
teacher_vocab = {c: i for i, c in enumerate(dict.fromkeys(text))}
V = len(student_vocab)
teacher, student = LM(12).eval(), LM(6)
opt = torch.optim.AdamW(student.parameters(), lr=1e-3)
ids = torch.tensor([[student_vocab[c] for c in text[i : i + S]] for i in range(0, 24, 6)])
for step in range(3):
    with torch.no_grad():
        t = teacher(ids)
    loss = F.kl_div(student(ids).log_softmax(-1), t.softmax(-1), reduction="sum") / ids.numel()
    loss.backward()
    opt.step()
    opt.zero_grad()
""",
    ),
}

# a batchmean of rows that have two axes, beside a hard mean over all rows
BATCHMEAN = (
    TEXT
    + """
import fastkd
T = 2.0
for step in range(3):
    with torch.no_grad():
        t = teacher(ids)[:, :-1]
    s = student(ids)[:, :-1]
    log_q, p = F.log_softmax(s / T, -1), F.softmax(t / T, -1)
    soft = {soft}
    loss = 0.5 * {factor} * soft + 0.5 * F.cross_entropy(s.reshape(-1, V), ids[:, 1:].reshape(-1))
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
)
PAIRS = {
    "torch": 'F.kl_div(log_q, p, reduction="batchmean")',
    "fastkd": 'fastkd.kl_div(s, t, temperature=T, reduction="batchmean")',
}
FAULTS |= {
    f"batchmean of rows with two axes, {name}": (
        "reduction",
        "soft = ",
        BATCHMEAN.format(soft=soft, factor="T * T"),
    )
    for name, soft in PAIRS.items()
}
