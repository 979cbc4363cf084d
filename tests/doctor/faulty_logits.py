"""Losses of one logit each, of tokens, and means over classes, with one planted fault each."""

from __future__ import annotations

from faulty_images import IMAGES

# one logit for each of five labels
BINARY = (
    IMAGES
    + """
import fastkd
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for i in range(4):
    with torch.no_grad():
        t = teacher(X)
    s = student(X)
    loss = fastkd.binary_distillation_loss({operands}, X[:, :5] > 0, alpha=0.3)
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
)
FAULTS: dict[str, tuple[str, str, str]] = {
    f"one logit each: {finding}": (finding, "loss = fastkd", BINARY.replace("{operands}", operands))
    for finding, operands in (
        ("probabilities", "s.sigmoid(), t.sigmoid()"),
        ("swapped", "t, s"),
        ("shared", "s, s"),
    )
}
FAULTS["a mask that has no name in the call"] = (
    "mask",
    "loss = F.kl_div",
    IMAGES
    + """
class Tokens(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table, self.head = nn.Embedding(9, width), nn.Linear(width, 5)
    def forward(self, input_ids, attention_mask):
        return self.head(self.table(input_ids))
student, teacher = Tokens(6), Tokens(8).eval()
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for i in range(4):
    ids, mask = torch.randint(1, 9, (4, 10)), torch.ones(4, 10).long()
    mask[:, 7:] = 0
    with torch.no_grad():
        t = teacher(ids, mask)
    s = student(ids, mask).log_softmax(-1)
    loss = F.kl_div(s, t.softmax(-1), reduction="none").sum(-1).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
)

# means over rows times classes: the weight of 2.8 has T^2 in it, so the mean alone is at fault
MEAN = (
    IMAGES
    + """
T = 2.0
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for i in range(4):
    with torch.no_grad():
        t = teacher(X)
    s = student(X)
    log_q, p = F.log_softmax(s / T, dim=1), F.softmax(t / T, dim=1)
    soft = {soft}
    loss = 0.3 * F.cross_entropy(s, Y) + 2.8 * soft
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
)
MEANS = {
    "by default": "nn.KLDivLoss()(log_q, p)",
    "by name": 'F.kl_div(log_q, p, reduction="mean")',
    "by an old option": "F.kl_div(log_q, p, True)",
    "of values per class": 'F.kl_div(log_q, p, reduction="none").mean()',
    "over the classes first": 'F.kl_div(log_q, p, reduction="none").mean(-1).mean()',
    "by hand": "(p * (p.log() - log_q)).mean()",
}
FAULTS |= {
    f"a mean over classes {name}": ("reduction", "soft = ", MEAN.format(soft=soft))
    for name, soft in MEANS.items()
}
