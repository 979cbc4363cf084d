"""Classifiers with one planted fault each: {name: (finding, text of its line, script)}."""

from __future__ import annotations

IMAGES = """
import copy
import torch
from torch import nn
import torch.nn.functional as F
torch.manual_seed(0)

def net(width, p=0.0):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(p), nn.Linear(width, 5))

X, Y = torch.randn(64, 8), torch.randint(0, 5, (64,))
teacher, student = net(16).eval(), net(6)
"""

FAULTS: dict[str, tuple[str, str, str]] = {
    "T squared missing": (
        "temperature",
        "soft = F.kl_div",
        IMAGES
        + """
T, alpha = 4.0, 0.3
opt = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
for epoch in range(2):
    for i in range(0, 64, 16):
        x, y = X[i:i + 16], Y[i:i + 16]
        with torch.no_grad():
            t = teacher(x)
        s = student(x)
        soft = F.kl_div(F.log_softmax(s / T, dim=1), F.softmax(t / T, dim=1), reduction="batchmean")
        loss = alpha * F.cross_entropy(s, y) + (1 - alpha) * soft
        opt.zero_grad()
        loss.backward()
        opt.step()
""",
    ),
    "T squared on both": (
        "temperature",
        "F.kl_div",
        IMAGES
        + """
T, alpha = 5.0, 0.1
opt = torch.optim.Adam(student.parameters())
def criterion(s, t):
    soft = F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="batchmean")
    return (alpha * F.cross_entropy(s, Y) + (1 - alpha) * soft) * T ** 2
for i in range(3):
    with torch.no_grad():
        t = teacher(X)
    opt.zero_grad()
    criterion(student(X), t).backward()
    opt.step()
""",
    ),
    "T squared doubled": (
        "temperature",
        "T * T",
        IMAGES
        + """
import fastkd
T = 3.0
opt = torch.optim.Adam(student.parameters())
for i in range(3):
    with torch.no_grad():
        t = teacher(X)
    loss = fastkd.distillation_loss(student(X), t, Y, temperature=T, alpha=0.0) * (T * T)
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "teacher in train mode": (
        "teacher_mode",
        "return F.kl_div",
        IMAGES
        + """
teacher = net(16, p=0.2)
class Distiller:
    def __init__(self, student, teacher):
        self.student, self.teacher, self.T = student, teacher, 4.0
        self.opt = torch.optim.AdamW(student.parameters(), lr=1e-3)
    def loss(self, x):
        with torch.no_grad():
            t = self.teacher(x)
        s = self.student(x)
        q, p = F.log_softmax(s / self.T, 1), F.softmax(t / self.T, 1)
        return F.kl_div(q, p, reduction="batchmean") * self.T ** 2
    def step(self, x):
        self.opt.zero_grad()
        loss = self.loss(x)
        loss.backward()
        self.opt.step()
d = Distiller(student, teacher)
for _ in range(4):
    d.step(X)
""",
    ),
    "teacher with gradient": (
        "teacher_gradient",
        "criterion(",
        IMAGES
        + """
criterion = nn.KLDivLoss(reduction="batchmean")
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    s, t = student(X), teacher(X)
    loss = criterion(torch.log_softmax(s, dim=1), torch.softmax(t, dim=1))
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "teacher in the optimizer": (
        "teacher_gradient",
        "torch.optim.Adam",
        IMAGES
        + """
opt = torch.optim.Adam(list(student.parameters()) + list(teacher.parameters()), lr=1e-3)
for _ in range(3):
    s, t = student(X), teacher(X)
    loss = F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")
    loss = loss + F.cross_entropy(s, Y)
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "one object": (
        "shared",
        "F.kl_div",
        IMAGES
        + """
student = net(16)
teacher = student
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    teacher.eval()
    with torch.no_grad():
        t = teacher(X)
    student.train()
    s = student(X)
    loss = F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")
    opt.zero_grad()
    (loss + F.cross_entropy(s, Y)).backward()
    opt.step()
""",
    ),
    "tied layers": (
        "shared",
        "F.kl_div",
        IMAGES
        + """
student = nn.Sequential(*[teacher[0], nn.ReLU(), nn.Linear(16, 5)])
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    with torch.no_grad():
        t = teacher(X)
    loss = F.kl_div(F.log_softmax(student(X), 1), F.softmax(t, 1), reduction="batchmean")
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "swapped in kl_div": (
        "swapped",
        "F.kl_div",
        IMAGES
        + """
opt = torch.optim.SGD(student.parameters(), lr=0.1)
def distill(out, ref, T):
    return F.kl_div(F.log_softmax(ref / T, 1), F.softmax(out / T, 1), reduction="batchmean") * T * T
for _ in range(3):
    with torch.no_grad():
        t = teacher(X)
    loss = distill(student(X), t, 2.0)
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "swapped in fastkd": (
        "swapped",
        "fastkd.distillation_loss",
        IMAGES
        + """
import fastkd
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    with torch.no_grad():
        t = teacher(X)
    loss = fastkd.distillation_loss(t, student(X), Y)
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "softmax twice": (
        "probabilities",
        "F.kl_div",
        IMAGES
        + """
teacher = nn.Sequential(net(16), nn.Softmax(dim=1)).eval()
opt = torch.optim.SGD(student.parameters(), lr=0.1)
T = 2.0
for _ in range(3):
    with torch.no_grad():
        t = teacher(X)
    loss = F.kl_div(F.log_softmax(student(X) / T, 1), F.softmax(t / T, 1), reduction="batchmean")
    opt.zero_grad()
    (loss * T * T).backward()
    opt.step()
""",
    ),
    "log-probabilities as a target": (
        "probabilities",
        "F.kl_div",
        IMAGES
        + """
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    with torch.no_grad():
        t = F.log_softmax(teacher(X), 1)
    loss = F.kl_div(F.log_softmax(student(X), 1), t, reduction="batchmean")
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "axis of the batch": (
        "axis",
        "F.kl_div",
        IMAGES
        + """
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    with torch.no_grad():
        t = teacher(X)
    loss = F.kl_div(F.log_softmax(student(X), 0), F.softmax(t, dim=0), reduction="batchmean")
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "stored in another order": (
        "order",
        "F.kl_div",
        IMAGES
        + """
from torch.utils.data import DataLoader, TensorDataset
data = TensorDataset(X, Y)
with torch.no_grad():
    stored = torch.cat([teacher(x) for x, _ in DataLoader(data, batch_size=16)])
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for epoch in range(2):
    for i, (x, y) in enumerate(DataLoader(data, batch_size=16, shuffle=True)):
        t = stored[16 * i : 16 * i + len(x)]
        s = student(x)
        loss = F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")
        opt.zero_grad()
        (loss + F.cross_entropy(s, y)).backward()
        opt.step()
""",
    ),
    "projector left out": (
        "projector",
        "proj(",
        IMAGES
        + """
proj = nn.Linear(6, 16)
opt = torch.optim.Adam(student.parameters(), lr=1e-3)
for _ in range(3):
    h = student[0](X)
    with torch.no_grad():
        th = teacher[0](X)
    loss = F.cross_entropy(student[3](F.relu(h)), Y) + 0.1 * F.mse_loss(proj(h), th)
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "detached": (
        "gradient",
        "F.kl_div",
        IMAGES
        + """
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    s = student(X)
    with torch.no_grad():
        t = teacher(X)
        soft = F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")
    loss = F.cross_entropy(s, Y) + soft
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "frozen student": (
        "gradient",
        "opt.step()",
        IMAGES
        + """
for p in student.parameters():
    p.requires_grad_(False)
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    with torch.no_grad():
        t = teacher(X)
    s = student(X)
    loss = F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")
    opt.zero_grad()
    if loss.requires_grad:
        loss.backward()
    opt.step()
""",
    ),
    "float16 without a scale": (
        "float16",
        "",
        IMAGES
        + """
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    with torch.autocast("cpu", dtype=torch.float16):
        s = student(X)
        with torch.no_grad():
            t = teacher(X)
        p, q = F.softmax(t, 1).half(), F.softmax(s, 1).half()
        loss = 1e-3 * (p * ((p + 1e-8).log() - (q + 1e-8).log())).sum(1).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "schedule never stepped": (
        "schedule",
        "CosineAnnealingLR",
        IMAGES
        + """
def build(model):
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20)
    return opt, sched
opt, sched = build(student)
for _ in range(3):
    with torch.no_grad():
        t = teacher(X)
    loss = F.kl_div(F.log_softmax(student(X), 1), F.softmax(t, 1), reduction="batchmean")
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "rate put back": (
        "schedule",
        "StepLR",
        IMAGES
        + """
opt = torch.optim.SGD(student.parameters(), lr=0.1)
sched = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
for _ in range(5):
    for group in opt.param_groups:
        group["lr"] = 0.1
    with torch.no_grad():
        t = teacher(X)
    loss = F.kl_div(F.log_softmax(student(X), 1), F.softmax(t, 1), reduction="batchmean")
    opt.zero_grad()
    loss.backward()
    opt.step()
    sched.step()
""",
    ),
}
