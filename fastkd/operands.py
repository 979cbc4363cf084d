"""What may stand in for a tensor of logits."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastkd.arguments.messages import shown, sizes
from fastkd.arguments.numbers import temperature_of
from fastkd.arguments.tensors import check_head, check_topk, head_numbers, product_dtype


class Head(NamedTuple):
    """What turns hidden states into logits besides tensors; dtype is that of the products."""

    scale: float
    softcap: float | None
    dtype: torch.dtype


class LinearLogits:
    """Logits of a language model's head that are never built: hidden states and the head's weight.

        logits = cap(scale * (hidden @ weight.T + bias)),   cap(z) = softcap * tanh(z / softcap)

    Stands in for the student's logits, the teacher's or both, in every loss of fastkd: the two
    N x V matrices then exist a chunk of rows at a time, and the student's chunk is overwritten by
    its own gradient. The two sides may differ in hidden size and dtype.

    With reduction="none", with a weight or normalizer that requires grad and under torch.compile,
    backward makes the logits a second time (six products, not four); double backward, the
    reference backend and a divergence without a dual (for a teacher's gradient) build them in full.

    It is made where the logits would be made, and behaves as they would: under `torch.no_grad` it
    takes no part in autograd, under autocast its products run in autocast's dtype. A CPU for which
    torch has no fast product in 16 bits multiplies in float32; each gradient is rounded once there.

    scale multiplies what the head gives, its bias too, and the softcap comes last. So Cohere's
    logit_scale is `scale`, Granite's logits_scaling is `scale=1 / logits_scaling`, Gemma's
    final_logit_softcapping is `softcap`. A scale that is learnt goes into the operands instead:
    `LinearLogits(hidden * scale, weight)`.

    Args:
        hidden: hidden states [..., H], float32, bfloat16, float16 or float64.
        weight: the head's weight [V, H], in hidden's dtype unless under autocast. One that
            requires grad gets its gradient, a teacher's too: detach it, or freeze the teacher.
        bias: [V] floats, or None.
        scale: a finite number other than 0.
        softcap: a positive number, or None for none.
        chunk_size: rows of a chunk; None for what FASTKD_CHUNK (read when fastkd is imported)
            says, or else for what a budget of memory holds. Where both sides give one, the
            smaller. It changes results by rounding only.
        pack: leave ignored rows out of the matrix products. Counting them waits for the device,
            once a call; torch.compile leaves them in.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, or sizes that do not match.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        chunk_size: int | None = None,
        pack: bool = False,
    ) -> None:
        check_head(hidden, weight, bias)
        scale, cap, rows = head_numbers(scale, softcap, chunk_size)
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()
            bias = None if bias is None else bias.detach()
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.head = Head(scale, cap, product_dtype(hidden, weight))
        self.chunk_size, self.pack = rows, bool(pack)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias."""
        return self.hidden, self.weight, self.bias

    @property
    def shape(self) -> torch.Size:
        """[..., V], the shape of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.size(0)))

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        return any(x is not None and x.requires_grad for x in self.tensors)

    def with_hidden(self, hidden: Tensor) -> LinearLogits:
        """The same head over other hidden states [..., H]."""
        scale, cap, _ = self.head
        of: Any = {"scale": scale, "softcap": cap, "chunk_size": self.chunk_size, "pack": self.pack}
        return LinearLogits(hidden, self.weight, self.bias, **of)

    def dim(self) -> int:
        return self.hidden.dim()

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def __repr__(self) -> str:
        text = f"LinearLogits({sizes(self.shape)} of {self.dtype}, H={self.hidden.size(-1)}"
        text += ", bias" if self.bias is not None else ""
        scale, cap, _ = self.head
        text += f", scale={scale:g}" if scale != 1.0 else ""
        return text + (f", softcap={cap:g})" if cap is not None else ")")


# What a log-probability may be above its true value: 0.01 where it was written with two decimals
# and cut, and 2^-8 of its size where it was rounded to bfloat16; a little more for what is squared.
CUT = 0.0101
ROUNDED = 2.0**-8 / (1 - 2.0**-8)


def most_mass(logprobs: Tensor) -> Tensor:
    """[...] the most that rounding makes of the mass 1 of rows of log-probabilities [..., K].

    Of stored l = log p + e with sum p <= 1: sum exp(l) - 1 <= sum exp(l) (1 - exp(-e)), and so at
    most sum exp(l) e. It is a row's entropy that counts and not its dtype, which tells nothing once
    rows have been cast back. Not to be read but where it is passed; a NaN passes nothing.
    """
    p = logprobs.exp()
    sizes = torch.where(p > 0, p * -logprobs, 0.0)
    return 1.0 + CUT + ROUNDED * sizes.sum(-1)


def unmeasured_rest(logprobs: Tensor) -> Tensor:
    """[...] log(1 - sum p), float64, of rows [..., K] whose rest nobody measured.

    Never -inf: rounding hides a rest, and a mass of 1 or more does not say that there is none.
    """
    mass = logprobs.double().exp().sum(-1)
    return torch.log1p(-mass.clamp(max=1.0 - 2**-53))


def join_rest(
    logprobs: Tensor, indices: Tensor, tail_logprob: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The three, with the columns from vocab_size on made a part of the rest."""
    tail = unmeasured_rest(logprobs) if tail_logprob is None else tail_logprob.double()
    past = indices >= vocab_size
    parts = logprobs.double().masked_fill(~past, -torch.inf)
    tail = torch.cat((parts, tail.unsqueeze(-1)), -1).logsumexp(-1).clamp_max(0.0)
    acc = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    return logprobs.masked_fill(past, -torch.inf), indices.masked_fill(past, -1), tail.to(acc)


Tail = Literal["bucket", "renormalize", "restrict", "drop"]
TAILS = ("bucket", "renormalize", "restrict", "drop")


class TopK:
    """A stored teacher: log-probabilities of some columns of a row, and what is made of the rest.

    Stands in for the teacher's logits in every loss of fastkd, beside a tensor of logits or a
    `LinearLogits`. With p the stored probabilities, S their columns and q the student's softmax:

        "bucket"       D over S and one more outcome, what is left on either side: 1 - sum p and the
                       student's sum of q off S. At most D of the full distributions, 0 where they
                       are equal.
        "renormalize"  D(p / sum p, q): the teacher's rest is 0, the student keeps its full softmax.
                       reverse_kl is +inf, as for any column that the teacher excludes.
        "restrict"     D(p / sum p, q / sum q over S); columns off S have gradient exactly 0.
        "drop"         the terms of S alone, of p and q as they are: may fall below 0.

    A stored temperature is a part of p, and the loss is called with the same one. At another, p is
    known as softmax(logprobs * stored / requested) where it is needed up to its sum only: with
    "renormalize" and "restrict", and of rows that name all columns.

    A column is absent, whatever else its place holds, where its index is -1 or its logprob -inf:
    servers that have no candidate for a place send either. A row that has no column at all is no
    row of a teacher.

    The teacher's vocabulary may be larger than the student's (padded, or with tokens of its own):
    with "bucket" its further columns are a part of the rest, as `within` makes them; the other
    tails refuse them, where values are looked at.

    Args:
        logprobs: [..., K] floats, log p at `temperature`, at most 0. One that requires grad gets
            its gradient through the reference, in plain torch.
        indices: [..., K] int32 or int64, the columns, in any order. A row names each column at most
            once, absent ones apart.
        tail_logprob: [...] floats, log(1 - sum p) as it was measured when p was, used by "bucket";
            None: worked out from logprobs, in float64, at least 2^-53: where rounding takes sum p
            to 1 or above, nothing says that the rest is 0 (what is known is a measured -inf).
        temperature: T > 0 of the softmax that gave p.
        tail: one of the four names above.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, or sizes that do not match. Values are
            looked at by the loss, on the CPU always and on a GPU inside `fastkd.checked()`: an
            index out of range or named twice, a logprob that is NaN or above 0, a row without a
            column, and, with "bucket" and "drop", a mass above 1 by more than log-probabilities
            rounded to bfloat16 or two decimals explain. Elsewhere a bad index, or no column, makes
            its row NaN.
    """

    def __init__(
        self,
        logprobs: Tensor,
        indices: Tensor,
        *,
        tail_logprob: Tensor | None = None,
        temperature: float = 1.0,
        tail: Tail = "bucket",
    ) -> None:
        check_topk(logprobs, indices, tail_logprob)
        if not isinstance(tail, str) or tail not in TAILS:
            raise ValueError(f"tail: got {shown(tail)}, expected one of {', '.join(TAILS)}")
        self.temperature = float(temperature_of(temperature))
        if not torch.is_grad_enabled():
            logprobs = logprobs.detach()
            tail_logprob = None if tail_logprob is None else tail_logprob.detach()
        self.logprobs, self.indices, self.tail_logprob = logprobs, indices, tail_logprob
        self.tail = tail

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """What may have a gradient: logprobs and tail_logprob."""
        return self.logprobs, self.tail_logprob

    @property
    def shape(self) -> torch.Size:
        """[..., K], that of logprobs."""
        return self.logprobs.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of logprobs."""
        return self.logprobs.dtype

    @property
    def device(self) -> torch.device:
        return self.logprobs.device

    @property
    def requires_grad(self) -> bool:
        return any(x is not None and x.requires_grad for x in self.tensors)

    def dim(self) -> int:
        return self.logprobs.dim()

    def size(self, dim: int) -> int:
        return self.logprobs.size(dim)

    def to(self, *args: Any, **kwargs: Any) -> TopK:
        """The same on another device, as `Tensor.to(device, non_blocking=...)`; dtypes stay."""
        return self._with(lambda x: x.to(*args, **kwargs))

    def pin_memory(self) -> TopK:
        """The same in pinned memory, which a DataLoader asks for."""
        return self._with(lambda x: x.pin_memory())

    def detach(self) -> TopK:
        """The same without a part in autograd."""
        return self._with(lambda x: x.detach())

    def outside(self, vocab_size: int) -> Tensor:
        """[...] int64, how many columns of each row `within` would move to the rest."""
        past = (self.indices >= vocab_size) & (self.logprobs != -torch.inf)
        return past.sum(-1)

    def within(self, vocab_size: int) -> TopK:
        """The same teacher for a student of vocab_size columns; "bucket" only.

            tail = log(exp(tail_logprob) + sum of p over the columns from vocab_size on)

        The probability of columns that the student does not have goes to the bucket, and their
        places become padding. The losses do this by themselves; `outside` counts such columns.

        Raises:
            ValueError: another tail than "bucket", which has no place for them.
        """
        if self.tail != "bucket":
            raise ValueError(
                f"tail: got {self.tail!r}, expected 'bucket', which takes up the probability of "
                f"columns from {vocab_size} on; indices.masked_fill(indices >= {vocab_size}, -1) "
                "leaves them out"
            )
        logprobs, indices, tail = join_rest(*self._present(), self.tail_logprob, vocab_size)
        temperature = self.temperature
        return TopK(logprobs, indices, tail_logprob=tail, temperature=temperature, tail="bucket")

    def _present(self) -> tuple[Tensor, Tensor]:
        """logprobs and indices, -inf and -1 where a column is absent."""
        absent = (self.indices == -1) | (self.logprobs == -torch.inf)
        return self.logprobs.masked_fill(absent, -torch.inf), self.indices.masked_fill(absent, -1)

    def __getitem__(self, at: Any) -> TopK:
        """The rows logprobs[at], indices[at] and tail_logprob[at]; K stays as it is."""
        taken = self._with(lambda x: x[at])
        if taken.size(-1) != self.size(-1) or taken.dim() == 0:
            raise IndexError(f"got {shown(at)}, expected an index of rows {sizes(self.shape[:-1])}")
        return taken

    def _with(self, change: Any) -> TopK:
        tail = self.tail_logprob
        return TopK(
            change(self.logprobs),
            change(self.indices),
            tail_logprob=None if tail is None else change(tail),
            temperature=self.temperature,
            tail=self.tail,
        )

    @staticmethod
    def most_mass(logprobs: Tensor) -> Tensor:
        """[...] what sum p of rows of log-probabilities [..., K] may be: 1, and what rounding adds.

        The bound of "bucket" and "drop".
        """
        return most_mass(logprobs)

    def __repr__(self) -> str:
        text = f"TopK({sizes(self.shape)} of {self.dtype}, temperature={self.temperature:g}, "
        measured = ", tail_logprob" if self.tail_logprob is not None else ""
        return text + f"tail={self.tail!r}{measured})"


Operand = Tensor | LinearLogits
Teacher = Operand | TopK


def build(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    vocab: int,
    keep: Tensor | None = None,
) -> Tensor:
    """The first logits [..., vocab] themselves in plain torch, differentiable: the definition.

    keep: [...] bool or None; what rows hold that are not kept reaches no value and no gradient.
    """
    scale, cap, dtype = head
    weight, bias = weight[:vocab], None if bias is None else bias[:vocab]
    if keep is not None:
        hidden = torch.where(keep.unsqueeze(-1), hidden, 0.0)
    bias = None if bias is None else bias.to(dtype)
    z = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)
    z = z if scale == 1.0 else z * scale
    return z if cap is None else (z / cap).tanh() * cap
