"""Knowledge distillation over the vocabulary that never holds all the logits of student or teacher.

Per token with a teacher, q its distribution and p the student's, both at temperature T (Hinton et al., arXiv
1503.02531; T5Gemma keeps Gemma 2's form with T = 1, arXiv 2504.06225, section 3), y the student's capped logits:

    loss = alpha T^2 KL(q || p_T) + (1 - alpha) (-log p_1[target])        dloss/dy = alpha T (p_T - q) + (1 - alpha) …

KL differs from the cross-entropy -sum q log p by the teacher's entropy: the same gradient, and zero when the student is
the teacher. Tokens without a teacher (masking tokens of UL2) have the one-hot loss alone, T5Gemma 2's UL2 + KD (arXiv
2512.14856, section 4).

    TeacherStates   the whole distribution: one chunk's teacher logits stand beside one chunk's student logits
    TeacherTop      its k likeliest tokens; all others are one more outcome, whose mass is compared as a whole

With TeacherTop and R the outcomes outside the top k: KL = sum_k q log(q / p) + q_R log(q_R / p_R), p_R = sum over R of
p. Nothing is renormalised, so the student learns how much mass is elsewhere, not where. With k = V it is TeacherStates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from encore.objectives.split_vocabulary import SplitHead, Vocabulary, WholeVocabulary, held_columns, normalise_
from encore.objectives.sweep import (
    Score,
    capped_logits,
    check_operands,
    check_range,
    check_weights,
    default_chunk_tokens,
    matmul_operands,
    swept_loss,
)


@dataclass(frozen=True)
class TeacherStates:
    """What the teacher's stack made of M tokens, with its own width, head and soft-cap."""

    states: Float[Tensor, "M D"]
    head_weight: Float[Tensor, "V D"]
    softcap: float | None = None

    def select(self, rows: Int[Tensor, " m"]) -> TeacherStates:
        """These tokens, in this order."""
        return TeacherStates(self.states[rows], self.head_weight, self.softcap)

    def prepared(self, vocabulary: Vocabulary, num_columns: int) -> TeacherStates:
        """In the dtype of its products, with the rows of its head that belong to the columns held."""
        rows = self.head_weight[vocabulary.first_row : vocabulary.first_row + num_columns]
        return TeacherStates(*matmul_operands(self.states, rows), self.softcap)

    def log_probabilities(self, here: slice, temperature: float, vocabulary: Vocabulary) -> Float[Tensor, "n v"]:
        """Of one chunk, in a buffer of its own."""
        logits = capped_logits(self.states[here], self.head_weight, self.softcap)
        if temperature != 1.0:
            logits.div_(temperature)
        return normalise_(logits, vocabulary)

    def divergence(
        self, here: slice, student: Float[Tensor, "n v"], temperature: float, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor]:
        """KL (n,) from the student's log-probabilities at that temperature, and its gradient p - q (n, v)."""
        log_teacher = self.log_probabilities(here, temperature, vocabulary).to(student.dtype)
        teacher = log_teacher.exp()
        losses = vocabulary.total(log_teacher.sub_(student).mul_(teacher).sum(dim=1))
        return losses, torch.exp(student, out=log_teacher).sub_(teacher)


@dataclass(frozen=True)
class TeacherTop:
    """The k likeliest tokens of M positions, and the log of the mass of all the others (-inf: none).

    Log-probabilities are those of one temperature, the one that the loss is asked for.
    """

    ids: Int[Tensor, "M k"]
    log_probabilities: Float[Tensor, "M k"]
    log_rest: Float[Tensor, " M"]

    def select(self, rows: Int[Tensor, " m"]) -> TeacherTop:
        """These tokens, in this order."""
        return TeacherTop(self.ids[rows], self.log_probabilities[rows], self.log_rest[rows])

    def prepared(self, vocabulary: Vocabulary, num_columns: int) -> TeacherTop:
        return self

    def divergence(
        self, here: slice, student: Float[Tensor, "n v"], temperature: float, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor]:
        """KL (n,) over k + 1 outcomes, and its gradient in the student's logits (n, v)."""
        columns, held = held_columns(self.ids[here].long(), vocabulary, student.shape[1])
        log_top, log_rest = self.log_probabilities[here].to(student.dtype), self.log_rest[here, None].to(student.dtype)
        top, rest = log_top.exp(), log_rest.exp()
        gradient = student.exp()
        student_top = torch.where(held, gradient.gather(1, columns), 0.0)
        gradient.scatter_add_(1, columns, -student_top)  # leaves zeros there: no id comes twice
        student_rest = vocabulary.total(gradient.sum(dim=1, keepdim=True)).clamp_min(torch.finfo(student.dtype).tiny)
        of_top = torch.where(held, top * (log_top - student.gather(1, columns)), 0.0).sum(dim=1)
        losses = vocabulary.total(of_top) + torch.xlogy(rest, rest / student_rest)[:, 0]
        gradient.mul_(1 - rest / student_rest).scatter_add_(1, columns, torch.where(held, student_top - top, 0.0))
        return losses, gradient


Teacher = TeacherStates | TeacherTop


def distillation(
    states: Float[Tensor, "N D"],
    head_weight: Float[Tensor, "V D"] | SplitHead,
    targets: Int[Tensor, " N"],
    teacher: Teacher,
    taught: Int[Tensor, " N"],
    weights: Float[Tensor, " N"] | None = None,
    softcap: float | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum over tokens of weight x loss (nats), and the sum of weights. Differentiable (once) in states and head weight.

    Args:
        targets: the one-hot targets; used where there is no teacher, and by the share 1 - alpha.
        teacher: its M tokens; constants, no gradient goes there.
        taught: for each of the N tokens which of the M speaks about it, or -1 for none.
        weights: as in `cross_entropy`: tokens of weight 0 cost nothing, None = all 1.

    A head weight that is split over processes is a SplitHead, as in `cross_entropy`; each process has the whole teacher
    and makes those of its logits that belong to the rows held.

    Raises ValueError for misshapen arguments, other vocabularies and ids outside of them.
    """
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
    held = head_weight if isinstance(head_weight, Tensor) else head_weight.rows
    check_operands(states, held, targets, softcap, chunk_tokens)
    check_weights(weights, targets)
    _check_teacher(teacher, taught, targets, head_weight.shape[0], temperature, alpha)
    weights = weights.to(torch.promote_types(states.dtype, torch.float32))
    total_weight = weights.sum()
    counted = weights.ne(0)
    with_teacher = (counted & (taught >= 0)).nonzero().squeeze(1)
    rows = torch.cat([with_teacher, (counted & (taught < 0)).nonzero().squeeze(1)])
    check_range(targets[rows], head_weight.shape[0])
    vocabulary: Vocabulary = WholeVocabulary() if isinstance(head_weight, Tensor) else head_weight
    teacher = teacher.select(taught[with_teacher]).prepared(vocabulary, held.shape[0])
    states, weights = states[rows], weights[rows]
    score = _against(teacher, len(with_teacher), targets[rows], weights, vocabulary, temperature, alpha)
    chunk = chunk_tokens or default_chunk_tokens(held.shape[0], states.device)
    if not isinstance(head_weight, Tensor):
        states = head_weight.states(states)
    return swept_loss(states, held, weights, softcap, score, chunk), total_weight


def _against(
    teacher: Teacher,
    num_taught: int,
    targets: Tensor,
    weights: Tensor,
    vocabulary: Vocabulary,
    temperature: float,
    alpha: float,
) -> Score:
    """The first `num_taught` tokens have a teacher, the others one-hot targets."""

    def score(here: slice, logits: Tensor, with_gradient: bool) -> Tensor:
        number = min(max(num_taught - here.start, 0), len(logits))
        taught = slice(here.start, here.start + number)
        one_hot_share = torch.ones_like(weights[here], dtype=logits.dtype)
        one_hot_share[:number] = 1 - alpha
        softened = logits[:number] / temperature if temperature != 1.0 and number else None
        normalise_(logits, vocabulary)
        column, held = held_columns(targets[here, None], vocabulary, logits.shape[1])
        losses = -one_hot_share * vocabulary.total(torch.where(held, logits.gather(1, column), 0.0))[:, 0]
        gradient = None
        if number:
            if softened is not None:
                normalise_(softened, vocabulary)
            student = logits[:number] if softened is None else softened
            divergences, gradient = teacher.divergence(taught, student, temperature, vocabulary)
            losses[:number] += alpha * temperature**2 * divergences
        if with_gradient:
            logits.exp_().mul_(one_hot_share[:, None]).scatter_add_(
                1, column, torch.where(held, -one_hot_share[:, None], 0.0)
            )
            if gradient is not None:
                logits[:number].add_(gradient, alpha=alpha * temperature)
            logits.mul_(weights[here, None])
        return losses

    return score


@torch.no_grad()
def top_of_teacher(
    teacher: TeacherStates, k: int, *, temperature: float = 1.0, chunk_tokens: int | None = None
) -> TeacherTop:
    """What TeacherTop holds of a teacher's M tokens, chunk by chunk; likeliest first."""
    vocab_size = teacher.head_weight.shape[0]
    if not 0 < k <= vocab_size:
        raise ValueError(f"k is {k}; expected 1 to {vocab_size}, the vocabulary")
    whole = WholeVocabulary()
    teacher = teacher.prepared(whole, vocab_size)
    chunk = chunk_tokens or default_chunk_tokens(vocab_size, teacher.states.device)
    ids, tops, rests = [], [], []
    for start in range(0, len(teacher.states), chunk):
        log_probabilities = teacher.log_probabilities(slice(start, start + chunk), temperature, whole)
        top, here = log_probabilities.topk(k, dim=1)
        rests.append(log_probabilities.exp_().scatter_(1, here, 0.0).sum(dim=1).log_())
        ids.append(here)
        tops.append(top)
    if not ids:
        nothing = teacher.states.new_empty((0, k))
        return TeacherTop(nothing.long(), nothing, nothing.new_empty(0))
    return TeacherTop(torch.cat(ids), torch.cat(tops), torch.cat(rests))


def _check_teacher(
    teacher: Teacher, taught: Tensor, targets: Tensor, vocab_size: int, temperature: float, alpha: float
) -> None:
    if taught.shape != targets.shape or taught.dtype != torch.int64:
        raise ValueError(
            f"taught has shape {tuple(taught.shape)} and type {taught.dtype}; expected {tuple(targets.shape)} of int64"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected 0 (one-hot targets alone) to 1 (the teacher alone)")
    if isinstance(teacher, TeacherStates):
        if teacher.head_weight.shape[0] != vocab_size:
            raise ValueError(
                f"the teacher's head has {teacher.head_weight.shape[0]} rows, the student's {vocab_size}; "
                "they need the same vocabulary"
            )
        number = len(teacher.states)
    else:
        number = len(teacher.ids)
        if teacher.ids.numel() and not 0 <= int(teacher.ids.min()) <= int(teacher.ids.max()) < vocab_size:
            raise ValueError(f"the teacher names ids outside the student's vocabulary 0..{vocab_size - 1}")
    if len(taught) and int(taught.max()) >= number:
        raise ValueError(f"taught points to teacher token {int(taught.max())}, but the teacher has {number}")
