"""Distillation in chunks beside all logits at once in float64: same values, same gradients, no (N, V) anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from encore.objectives.distill import Teacher, TeacherStates, TeacherTop, distillation, top_of_teacher
from encore.objectives.losses import cross_entropy

N, V, D, TEACHER_D = 41, 97, 16, 24
CAPS = [(None, None), (5.0, None), (None, 12.0), (6.0, 15.0)]  # of student and teacher


class Problem:
    """A student of width 16 and a teacher of width 24 over 41 tokens, the teacher's rows in another order."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0, cap: float | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.states, self.head = (2 * normal(N, D)).requires_grad_(), normal(V, D).requires_grad_()
        self.teacher = TeacherStates(2 * normal(N - 6, TEACHER_D), normal(V, TEACHER_D), cap)
        self.targets = torch.randint(0, V, (N,), generator=generator)
        self.weights = torch.rand(N, generator=generator)
        self.weights[3] = self.weights[20] = 0.0
        self.taught = torch.full((N,), -1)
        places = torch.randperm(N, generator=generator)[: N - 6]
        self.taught[places] = torch.arange(N - 6)

    def loss(self, softcap: float | None, teacher: Teacher | None = None, **options: Any) -> Tensor:
        arguments = (self.targets, teacher or self.teacher, self.taught, self.weights, softcap)
        return distillation(self.states, self.head, *arguments, **options)[0]


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def dense(problem: Problem, softcap: float | None, temperature: float, alpha: float, k: int | None = None) -> Tensor:
    """The definition, all logits at once, in float64 (which the caller's problem has)."""
    total = torch.zeros((), dtype=torch.float64)
    student = capped(problem.states @ problem.head.T, softcap)
    teacher = capped(problem.teacher.states @ problem.teacher.head_weight.T, problem.teacher.softcap)
    for n in range(N):
        one_hot = -student[n].log_softmax(-1)[problem.targets[n]]
        loss = one_hot
        if (m := int(problem.taught[n])) >= 0:
            q, p = (teacher[m] / temperature).softmax(-1), (student[n] / temperature).softmax(-1)
            if k is not None:
                top = q.topk(k).indices
                rest = torch.ones(V, dtype=torch.bool).scatter_(0, top, False)
                q, p = (torch.cat([x[top], x[rest].sum()[None]]) for x in (q, p))
            divergence = torch.where(q > 0, q * (q / p).log(), 0.0).sum()
            loss = alpha * temperature**2 * divergence + (1 - alpha) * one_hot
        total = total + problem.weights[n].double() * loss
    return total


@pytest.mark.parametrize("caps", CAPS)
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (1.0, 0.3), (2.5, 0.3)])
@pytest.mark.parametrize("k", [None, 7])
def test_equal_to_all_logits_at_once(caps: Any, temperature: float, alpha: float, k: int | None) -> None:
    problem, exact = Problem(cap=caps[1]), Problem(torch.float64, cap=caps[1])
    teacher = None if k is None else top_of_teacher(problem.teacher, k, temperature=temperature, chunk_tokens=9)
    want = dense(exact, caps[0], temperature, alpha, k)
    expected = want, *torch.autograd.grad(want, (exact.states, exact.head))
    for chunk_tokens in (None, 1, 8):
        loss = problem.loss(caps[0], teacher, temperature=temperature, alpha=alpha, chunk_tokens=chunk_tokens)
        got = loss, *torch.autograd.grad(loss, (problem.states, problem.head))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_top_of_all_tokens_is_the_whole_distribution(temperature: float) -> None:
    problem = Problem(cap=4.0)
    top = top_of_teacher(problem.teacher, V, temperature=temperature)
    assert torch.isneginf(top.log_rest).all()
    whole, kept = problem.loss(5.0, temperature=temperature), problem.loss(5.0, top, temperature=temperature)
    torch.testing.assert_close(kept, whole, atol=1e-4, rtol=1e-5)
    for one, other in zip(
        *(torch.autograd.grad(loss, (problem.states, problem.head)) for loss in (kept, whole)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_the_top_and_the_rest_are_all_the_mass() -> None:
    top = top_of_teacher(Problem().teacher, 5, temperature=1.5, chunk_tokens=4)
    assert (top.log_probabilities.diff(dim=1) <= 0).all()
    torch.testing.assert_close(top.log_probabilities.exp().sum(1) + top.log_rest.exp(), torch.ones(N - 6))


def test_fewer_tokens_tell_less() -> None:
    """Merging outcomes never raises a divergence; the more are kept, the nearer to the whole."""
    problem = Problem()
    kept = [problem.loss(None, top_of_teacher(problem.teacher, k)).item() for k in (1, 4, 16, V)]
    assert kept == sorted(kept) and kept[0] < 0.9 * kept[-1]


@pytest.mark.parametrize("k", [None, 6])
def test_gradients_by_finite_differences(k: int | None) -> None:
    problem = Problem(torch.float64, cap=3.0)
    teacher = problem.teacher if k is None else top_of_teacher(problem.teacher, k, temperature=2.0)

    def loss(states: Tensor, head: Tensor) -> Tensor:
        rows = slice(0, 7)
        arguments = (problem.targets[rows], teacher, problem.taught[rows], problem.weights[rows].double(), 5.0)
        return distillation(states, head, *arguments, temperature=2.0, alpha=0.6, chunk_tokens=3)[0]

    states, head = problem.states[:7].detach().requires_grad_(), problem.head.detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, (states, head), fast_mode=True)  # along random directions


def test_a_student_that_is_the_teacher_loses_nothing_and_learns_nothing() -> None:
    problem = Problem(seed=3)
    taught = torch.arange(N)
    for teacher in (
        TeacherStates(problem.states.detach(), problem.head.detach(), 4.0),
        top_of_teacher(TeacherStates(problem.states.detach(), problem.head.detach(), 4.0), 5, temperature=1.7),
    ):
        loss, _ = distillation(
            problem.states, problem.head, problem.targets, teacher, taught, None, 4.0, temperature=1.7
        )
        assert abs(loss.item()) < 1e-4
        assert all(
            gradient.abs().max() < 1e-4 for gradient in torch.autograd.grad(loss, (problem.states, problem.head))
        )


def test_without_a_teacher_it_is_cross_entropy() -> None:
    problem = Problem()
    nobody = torch.full((N,), -1)
    arguments = (problem.states, problem.head, problem.targets)
    alone, total = distillation(*arguments, problem.teacher, nobody, problem.weights, 5.0, temperature=3.0)
    expected, expected_total = cross_entropy(*arguments, problem.weights, 5.0)
    torch.testing.assert_close(alone, expected)
    assert total.item() == expected_total.item()
    for one, other in zip(
        torch.autograd.grad(alone, arguments[:2]), torch.autograd.grad(expected, arguments[:2]), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    silent = TeacherStates(problem.teacher.states[:0], problem.teacher.head_weight)
    torch.testing.assert_close(distillation(*arguments, silent, nobody, problem.weights, 5.0)[0], expected)
    nothing, total = distillation(*arguments, problem.teacher, problem.taught, torch.zeros(N))
    assert nothing.item() == total.item() == 0.0


def test_tokens_of_weight_zero_may_hold_anything() -> None:
    problem = Problem()
    expected = torch.autograd.grad(problem.loss(None, alpha=0.5), (problem.states, problem.head))
    damaged = problem.states.detach().clone()
    damaged[3], damaged[20] = torch.nan, torch.inf
    problem.targets[3], problem.targets[20] = -100, V + 9
    for row in (3, 20):
        if problem.taught[row] >= 0:
            problem.teacher.states[problem.taught[row]] = torch.nan
    problem.states = damaged.requires_grad_()
    got = torch.autograd.grad(problem.loss(None, alpha=0.5), (problem.states, problem.head))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("k", [None, 8])
def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(k: int | None) -> None:
    """As near to the exact gradients as plain products in bfloat16 under a float32 softmax are."""
    problem, exact = Problem(cap=4.0), Problem(torch.float64, cap=4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        teacher = None if k is None else top_of_teacher(problem.teacher, k)
        loss = problem.loss(5.0, teacher, alpha=0.7)
    assert loss.dtype == torch.float32
    want = dense(exact, 5.0, 1.0, 0.7, k)
    assert loss.item() == pytest.approx(want.item(), rel=0.02)
    assert loss.item() != problem.loss(5.0, teacher, alpha=0.7).item(), "autocast changed nothing"
    gradients = torch.autograd.grad(loss, (problem.states, problem.head))
    for one, other in zip(gradients, torch.autograd.grad(want, (exact.states, exact.head)), strict=True):
        assert one.dtype == torch.float32
        assert (one.double() - other).norm() < 0.02 * other.norm()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return made


@pytest.mark.parametrize("k", [None, 32])
def test_all_logits_are_never_there(k: int | None) -> None:
    tokens, vocab_size, chunk_tokens = 300, 8_192, 16
    states, head = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocab_size, 8, requires_grad=True)
    whole = TeacherStates(torch.randn(tokens, 12), torch.randn(vocab_size, 12), 30.0)
    targets = torch.randint(0, vocab_size, (tokens,))
    bound = max(chunk_tokens * vocab_size, vocab_size * 12, tokens * (k or 0))
    with Largest() as largest:
        teacher = whole if k is None else top_of_teacher(whole, k, chunk_tokens=chunk_tokens)
        options: dict[str, Any] = {"temperature": 2.0, "alpha": 0.5, "chunk_tokens": chunk_tokens}
        loss, _ = distillation(states, head, targets, teacher, torch.arange(tokens), None, 30.0, **options)
        loss.backward()
    assert largest.elements == bound
    with Largest() as largest:
        F.cross_entropy(states @ head.T, targets).backward()
    assert largest.elements == tokens * vocab_size, "the measure does not see all logits"


def test_wrong_arguments_are_refused() -> None:
    problem = Problem()
    arguments = (problem.states, problem.head, problem.targets)
    other = TeacherStates(problem.teacher.states, problem.teacher.head_weight[:-1])
    top = top_of_teacher(problem.teacher, 3)
    beyond = TeacherTop(top.ids + V, top.log_probabilities, top.log_rest)
    for match, teacher, options in (
        ("the teacher's head has 96 rows, the student's 97", other, {}),
        ("ids outside the student's vocabulary", beyond, {}),
        ("temperature is 0", problem.teacher, {"temperature": 0.0}),
        ("alpha is 1.5", problem.teacher, {"alpha": 1.5}),
        ("chunk_tokens is 0", problem.teacher, {"chunk_tokens": 0}),
        (r"the teacher has 2$", problem.teacher.select(torch.arange(2)), {}),
    ):
        with pytest.raises(ValueError, match=match):
            distillation(*arguments, teacher, problem.taught, **options)
    with pytest.raises(ValueError, match=r"taught has shape \(5,\)"):
        distillation(*arguments, problem.teacher, problem.taught[:5])
    with pytest.raises(ValueError, match=r"k is 0; expected 1 to 97"):
        top_of_teacher(problem.teacher, 0)
