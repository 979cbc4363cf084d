"""Classifiers that are distilled without a fault: {name: script}."""

from __future__ import annotations

from faulty_images import IMAGES
from faulty_logits import BINARY, MEAN

RIGHT = {
    "hinton": IMAGES
    + """
T, alpha = 2.0, 0.1
opt = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
sched = torch.optim.lr_scheduler.StepLR(opt, step_size=1)
for epoch in range(2):
    student.train()
    for i in range(0, 64, 16):
        x, y = X[i:i + 16], Y[i:i + 16]
        with torch.no_grad():
            t = teacher(x)
        s = student(x)
        soft = F.kl_div(F.log_softmax(s / T, dim=1), F.softmax(t / T, dim=1), reduction="batchmean")
        loss = alpha * F.cross_entropy(s, Y[i:i + 16]) + (1 - alpha) * soft * T * T
        opt.zero_grad()
        loss.backward()
        opt.step()
    sched.step()
    student.eval()
    with torch.no_grad():
        accuracy = (student(X).argmax(1) == Y).float().mean().item()
""",
    "timm-like": IMAGES
    + """
class KDLoss(nn.Module):
    def __init__(self, base, teacher, T=3.0, weight=0.5):
        super().__init__()
        self.base, self.teacher, self.T, self.weight = base, teacher, T, weight
        self.teacher.requires_grad_(False)
    def forward(self, inputs, outputs, labels):
        with torch.no_grad():
            target = self.teacher(inputs)
        soft = F.kl_div(F.log_softmax(outputs / self.T, 1), F.log_softmax(target / self.T, 1),
                        reduction="sum", log_target=True) * (self.T * self.T) / outputs.numel()
        return self.base(outputs, labels) * (1 - self.weight) + soft * self.weight
criterion = KDLoss(nn.CrossEntropyLoss(label_smoothing=0.1), teacher)
groups = [{"params": [p for p in student.parameters() if p.dim() > 1], "weight_decay": 0.05},
          {"params": [p for p in student.parameters() if p.dim() < 2], "weight_decay": 0.0}]
opt = torch.optim.AdamW(groups, lr=1e-3)
for _ in range(3):
    opt.zero_grad()
    criterion(X, student(X), Y).backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    opt.step()
""",
    "by hand": IMAGES
    + """
opt = torch.optim.Adam(student.parameters(), lr=1e-3)
def train(T=2, soft_weight=0.25, hard_weight=0.75):
    ce = nn.CrossEntropyLoss()
    for i in range(4):
        opt.zero_grad()
        with torch.no_grad():
            teacher_logits = teacher(X)
        logits = student(X)
        targets = nn.functional.softmax(teacher_logits / T, dim=-1)
        log_q = nn.functional.log_softmax(logits / T, dim=-1)
        soft = torch.sum(targets * (targets.log() - log_q)) / log_q.size()[0] * (T ** 2)
        loss = soft_weight * soft + hard_weight * ce(logits, Y)
        loss.backward()
        opt.step()
train()
""",
    "accumulation of images": IMAGES
    + """
opt = torch.optim.SGD(student.parameters(), lr=0.1)
T, accumulate = 2.0, 2
for i in range(4):
    x, y = X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16]
    with torch.no_grad():
        t = teacher(x)
    s = student(x)
    kd = F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="batchmean") * T**2
    loss = (0.5 * kd + 0.5 * F.cross_entropy(s, y)) / accumulate
    loss.backward()
    if (i + 1) % accumulate == 0:
        opt.step()
        opt.zero_grad()
""",
    "scaler": IMAGES
    + """
opt = torch.optim.SGD(student.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
for _ in range(4):
    opt.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        s = student(X)
        with torch.no_grad():
            t = teacher(X)
    loss = F.kl_div(F.log_softmax(s.float(), 1), F.softmax(t.float(), 1), reduction="batchmean")
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    sched.step()
""",
    "features": IMAGES
    + """
class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 16)
    def forward(self, x):
        return self.layer(x)
features = {}
student[1].register_forward_hook(lambda m, i, o: features.update(student=o))
teacher[1].register_forward_hook(lambda m, i, o: features.update(teacher=o.detach()))
regressor = Regressor()
opt = torch.optim.Adam([*student.parameters(), *regressor.parameters()], lr=1e-3)
for _ in range(3):
    with torch.no_grad():
        teacher(X)
    logits = student(X)
    hint = F.mse_loss(regressor(features["student"]), features["teacher"])
    loss = F.cross_entropy(logits, Y) + 10.0 * hint
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    "logits by mse": IMAGES
    + """
opt = torch.optim.Adam(student.parameters(), lr=1e-3)
for _ in range(3):
    with torch.inference_mode():
        t = teacher(X).clone()
    s = student(X)
    loss = 0.5 * F.cross_entropy(s, Y) + 0.5 * ((s - t.clone()) ** 2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    "ensemble": IMAGES
    + """
teachers = nn.ModuleList([net(12), net(16)]).eval()
for p in teachers.parameters():
    p.requires_grad = False
opt = torch.optim.AdamW(student.parameters())
for _ in range(3):
    p = torch.stack([F.softmax(t(X) / 2.0, dim=1) for t in teachers]).mean(0)
    s = student(X)
    loss = F.kl_div(F.log_softmax(s / 2.0, 1), p, reduction="batchmean") * 4.0
    opt.zero_grad()
    (0.9 * loss + 0.1 * F.cross_entropy(s, Y)).backward()
    opt.step()
""",
    "average of the student": IMAGES
    + """
student = net(6, p=0.1)
ema = copy.deepcopy(student)
for p in ema.parameters():
    p.detach_()
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    with torch.no_grad():
        t = ema(X)
    s = student(X + 0.1 * torch.randn_like(X))
    loss = F.cross_entropy(s, Y) + F.mse_loss(F.softmax(s, 1), F.softmax(t, 1))
    opt.zero_grad()
    loss.backward()
    opt.step()
    with torch.no_grad():
        for a, b in zip(ema.parameters(), student.parameters()):
            a.mul_(0.99).add_(b, alpha=0.01)
""",
    "older copy": IMAGES
    + """
student = net(6, p=0.1)
older = copy.deepcopy(student).eval()
student[3].reset_parameters()
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for _ in range(3):
    with torch.no_grad():
        t = older(X)
    s = student(X)
    kd = F.kl_div(F.log_softmax(s, 1), F.log_softmax(t, 1), log_target=True, reduction="batchmean")
    opt.zero_grad()
    (kd + F.cross_entropy(s, Y)).backward()
    opt.step()
""",
    "mutual": IMAGES
    + """
a, b = net(6, 0.1), net(8, 0.1)
opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (a, b)]
kl = nn.KLDivLoss(reduction="batchmean")
for _ in range(3):
    outs = a(X), b(X)
    for i, opt in enumerate(opts):
        own, other = outs[i], outs[1 - i]
        loss = F.cross_entropy(own, Y) + kl(F.log_softmax(own, 1), F.softmax(other.detach(), 1))
        opt.zero_grad()
        loss.backward()
        opt.step()
""",
    "mutual with gradient": IMAGES
    + """
a, b = net(6), net(8)
opt = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
for _ in range(3):
    s, t = a(X), b(X)
    p, q = s.log_softmax(1), t.log_softmax(1)
    both = F.kl_div(p, q, log_target=True, reduction="batchmean")
    both = both + F.kl_div(q, p, log_target=True, reduction="batchmean")
    opt.zero_grad()
    (both + F.cross_entropy(s, Y) + F.cross_entropy(t, Y)).backward()
    opt.step()
""",
    "stored logits, shuffled with an index": IMAGES
    + """
from torch.utils.data import DataLoader, TensorDataset
with torch.no_grad():
    stored = torch.cat([teacher(x) for x in X.split(16)])
data = TensorDataset(X, Y, torch.arange(64))
opt = torch.optim.SGD(student.parameters(), lr=0.1)
for x, y, index in DataLoader(data, batch_size=16, shuffle=True):
    s = student(x)
    loss = F.cross_entropy(s, F.softmax(stored[index], 1)) + F.cross_entropy(s, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    "jensen-shannon of a mixture": IMAGES
    + """
opt = torch.optim.SGD(student.parameters(), lr=0.1)
def js(s, t):
    p, q = F.softmax(t, dim=1), F.softmax(s, dim=1)
    m = 0.5 * (p + q)
    a = F.kl_div(m.log(), p, reduction="batchmean")
    return 0.5 * a + 0.5 * (q * (q.log() - m.log())).sum(1).mean()
def skewed(s, t):
    p, q = F.softmax(t, dim=1), F.softmax(s, dim=1)
    return F.kl_div(F.log_softmax(s, 1), 0.9 * p + 0.1 * q.detach(), reduction="batchmean")
with torch.no_grad():
    stored = torch.cat([teacher(x).softmax(1) for x in X.split(16)])
for i in range(4):
    x, p = X[16 * i : 16 * i + 16], stored[16 * i : 16 * i + 16]
    with torch.no_grad():
        t = teacher(x)
    s = student(x)
    opt.zero_grad()
    (js(s, t) + skewed(s, t) + F.kl_div(s.log_softmax(1), p, reduction="batchmean")).backward()
    opt.step()
""",
    "teacher trained first": IMAGES
    + """
def fit(model, loader, loss_of, lr):
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, len(loader))
    for x, y in loader:
        loss = loss_of(model, x, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
loader = list(zip(X.split(16), Y.split(16)))
fit(teacher.train(), loader * 3, lambda m, x, y: F.cross_entropy(m(x), y), 1e-3)
teacher.eval()
@torch.no_grad()
def ask(x):
    return teacher(x)
def distil(m, x, y, T=4.0):
    s = m(x)
    kd = F.kl_div((s / T).log_softmax(1), (ask(x) / T).softmax(1), reduction="batchmean")
    return 0.9 * T * T * kd + 0.1 * F.cross_entropy(s, y)
fit(student, loader, distil, 1e-3)
""",
    "dense prediction": IMAGES
    + """
student, teacher = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1).eval()
opt = torch.optim.SGD(student.parameters(), lr=0.1)
images, marks = torch.randn(2, 3, 6, 6), torch.randint(0, 5, (2, 6, 6))
for _ in range(3):
    with torch.no_grad():
        t = teacher(images)
    s = student(images)
    pixels = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="none").sum(1).mean()
    a, b = s.flatten(2), t.flatten(2)  # channel by channel
    maps = F.kl_div(F.log_softmax(a, 2), F.softmax(b, 2), reduction="batchmean") / 5
    opt.zero_grad()
    (F.cross_entropy(s, marks) + pixels + maps).backward()
    opt.step()
""",
    "one logit each": BINARY.replace("{operands}", "s, t"),
    **{
        f"a mean {name}": MEAN.format(soft=soft)
        for name, soft in (
            ("over classes, undone", "F.kl_div(log_q, p) * s.size(1)"),
            ("over rows", 'F.kl_div(log_q, p, reduction="none").sum(1).mean()'),
            ("over rows by an old option", "F.kl_div(log_q, p, False) / len(s)"),
        )
    },
}
