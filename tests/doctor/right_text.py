"""Language models that are distilled without a fault: {name: script}."""

from __future__ import annotations

from faulty_text import BATCHMEAN, PAIRS, TEXT

RIGHT = {
    "masked language model, taught at every place": TEXT
    + """
MASK = V - 1
for _ in range(3):
    chosen = torch.rand(ids.shape) < 0.4
    labels = ids.masked_fill(~chosen, -100)
    inputs = ids.clamp(max=V - 2).masked_fill(chosen, MASK)
    with torch.no_grad():
        t = teacher(inputs)
    s = student(inputs)
    kd = F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="none").sum(-1).mean()
    for part in (4 * kd, F.cross_entropy(s.flatten(0, 1), labels.flatten())):
        part.backward(retain_graph=True)
    opt.step()
    opt.zero_grad()
""",
    "accumulation": TEXT
    + """
lengths = [9, 3, 7, 4, 9, 2]
for first in (0, 3):
    batches = [torch.randint(1, V, (2, n)) for n in lengths[first : first + 3]]
    total = sum((x.numel() for x in batches))
    for x in batches:
        with torch.no_grad():
            t = teacher(x)
        s = student(x)
        loss = F.kl_div(F.log_softmax(s, -1).view(-1, V), F.softmax(t, -1).view(-1, V),
                        reduction="sum")
        (loss / total).backward()
    opt.step()
    opt.zero_grad()
""",
    "jensen-shannon": TEXT
    + """
import math
def jsd_loss(s, t, beta=0.5, T=0.9):
    s, t = F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)
    m = torch.logsumexp(torch.stack([s + math.log(1 - beta), t + math.log(beta)]), dim=0)
    a = F.kl_div(m, t, reduction="none", log_target=True)
    b = F.kl_div(m, s, reduction="none", log_target=True)
    return beta * a + (1 - beta) * b
labels = ids.clone()
labels[:, :4] = -100
for _ in range(3):
    with torch.no_grad():
        t = teacher(ids)
    s = student(ids)
    rows = jsd_loss(s[:, :-1], t[:, :-1])
    mask = labels[:, 1:] != -100
    loss = rows[mask].sum() / mask.sum()
    loss.backward()
    opt.step()
    opt.zero_grad()
""",
    "language model": TEXT
    + """
import fastkd
PAD = 0
for n, row in zip((9, 6, 4, 3), ids):
    row[n:] = PAD
labels = ids.masked_fill(ids == PAD, -100)
labels[:, :2] = -100
for _ in range(3):
    with torch.no_grad():
        t = teacher(ids)
    s = student(ids)
    loss = fastkd.distillation_loss(s[:, :-1], t[:, :-1], labels[:, 1:], temperature=2.0, alpha=0.3)
    loss.backward()
    opt.step()
    opt.zero_grad()
""",
    "masked by hand": TEXT
    + """
attention_mask = torch.ones_like(ids)
for n, row, mask in zip((9, 6, 4, 3), ids, attention_mask):
    row[n:], mask[n:] = 0, 0
T = 2.0
for _ in range(3):
    with torch.no_grad():
        t = teacher(ids)
    s = student(ids)
    kd = F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="none").sum(-1)
    mask = attention_mask[:, 1:].float()
    kd = (kd[:, :-1] * mask).sum() / mask.sum() * T**2
    ce = F.cross_entropy(s[:, :-1].transpose(1, 2), ids[:, 1:], ignore_index=0)
    (0.5 * kd + 0.5 * ce).backward()
    opt.step()
    opt.zero_grad()
""",
    "stored top-k": TEXT
    + """
import fastkd
with torch.no_grad():
    stored = [fastkd.topk_from_logits(teacher(ids)[:, :-1], 4) for _ in range(3)]
for top in stored:
    loss = fastkd.kl_div(student(ids)[:, :-1], top)
    loss.backward()
    opt.step()
    opt.zero_grad()
""",
    "heads that are never built": TEXT
    + """
import fastkd
for _ in range(3):
    h = student.body(student.embed(ids))[0][:, :-1]
    with torch.no_grad():
        th = teacher.body(teacher.embed(ids))[0][:, :-1]
    s = fastkd.LinearLogits(h, student.head.weight, student.head.bias)
    t = fastkd.LinearLogits(th, teacher.head.weight, teacher.head.bias)
    loss = fastkd.distillation_loss(s, t, ids[:, 1:], temperature=2.0)
    loss.backward()
    opt.step()
    opt.zero_grad()
""",
    "reverse": TEXT
    + """
def reverse_kl(s, t, mask):
    q, log_q, log_p = F.softmax(s, -1), F.log_softmax(s, -1), F.log_softmax(t, -1)
    rows = (q * (log_q - log_p)).sum(-1)
    return (rows * mask).sum() / mask.sum()
for _ in range(3):
    with torch.no_grad():
        t = teacher(ids)
    loss = reverse_kl(student(ids)[:, :-1], t[:, :-1], torch.ones(4, S - 1))
    loss.backward()
    opt.step()
    opt.zero_grad()
""",
    "padded vocabulary": TEXT
    + """
import fastkd
teacher = LM(12).eval()
teacher.head = nn.Linear(12, V + 3)  # padded to a round size
for _ in range(3):
    with torch.no_grad():
        t = teacher(ids)
    loss = fastkd.kl_div(student(ids), t[..., :V])
    loss.backward()
    opt.step()
    opt.zero_grad()
""",
    **{
        f"batchmean made a mean over rows, {name}": BATCHMEAN.format(
            soft=f"{soft} / (S - 1)", factor="T * T"
        )
        for name, soft in PAIRS.items()
    },
    "batchmean made a mean over rows that floats round": BATCHMEAN.format(
        soft=f"{PAIRS['torch']} / 35", factor="3 * T * T"
    ).replace("(4, S)", "(3, 36)"),
    "batchmean beside a hard mean over the same size": BATCHMEAN.format(
        soft=PAIRS["torch"], factor="T * T"
    ).replace("s.reshape(-1, V), ids[:, 1:].reshape(-1)", "s.mean(1), ids[:, 0]"),
    "batchmean of sequences of several lengths": TEXT
    + """
for first in (9, 5):
    for size in (first, 3):
        x = ids[:, :size]
        with torch.no_grad():
            t = teacher(x)
        loss = F.kl_div(F.log_softmax(student(x), -1), F.softmax(t, -1), reduction="batchmean")
        (loss / 2).backward()
    opt.step()
    opt.zero_grad()
""",
}
