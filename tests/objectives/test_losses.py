"""The chunked loss beside the plain one: same values, same gradients, a fraction of the memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from encore.objectives.losses import cross_entropy, default_chunk_tokens, log_probabilities

N, V, D = 37, 101, 16


def problem(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = (2 * torch.randn(N, D, generator=generator, dtype=torch.float64)).to(dtype)
    head = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator)
    weights[3] = weights[20] = 0.0
    return states.requires_grad_(), head.requires_grad_(), targets, weights


def plain_logits(states: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    logits = states @ head.T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain(states: Tensor, head: Tensor, targets: Tensor, weights: Tensor, softcap: float | None) -> Tensor:
    losses = F.cross_entropy(plain_logits(states, head, softcap), targets, reduction="none")
    return (losses * weights).sum()


@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 8, 36, 37, 1000])
def test_equal_to_the_plain_loss(softcap: float | None, chunk_tokens: int | None) -> None:
    states, head, targets, weights = problem()
    loss, total = cross_entropy(states, head, targets, weights, softcap, chunk_tokens=chunk_tokens)
    expected = plain(states, head, targets, weights, softcap)
    assert total.item() == pytest.approx(weights.sum().item(), rel=1e-6)
    torch.testing.assert_close(loss / total, expected / weights.sum(), atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(loss, (states, head))
    for got, want in zip(gradients, torch.autograd.grad(expected, (states, head)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_by_finite_differences(softcap: float | None) -> None:
    states, head, targets, weights = problem(torch.float64)
    states, head = states[:9].detach().requires_grad_(), head[:13].detach().requires_grad_()
    targets, weights = targets[:9] % 13, weights[:9]

    def loss(states: Tensor, head: Tensor) -> Tensor:
        return cross_entropy(states, head, targets, weights, softcap, chunk_tokens=4)[0]

    def scores(states: Tensor, head: Tensor) -> Tensor:
        return log_probabilities(states, head, targets, softcap, chunk_tokens=4)

    assert torch.autograd.gradcheck(loss, (states, head))
    assert torch.autograd.gradcheck(scores, (states, head))


def test_no_weights_means_all_count() -> None:
    states, head, targets, _ = problem()
    loss, total = cross_entropy(states, head, targets)
    assert total.item() == N
    torch.testing.assert_close(loss / N, F.cross_entropy(states @ head.T, targets), atol=1e-5, rtol=1e-5)


def test_the_gradient_from_above_multiplies_and_can_come_twice() -> None:
    states, head, targets, weights = problem()
    loss, total = cross_entropy(states, head, targets, weights)
    once = torch.autograd.grad(loss, (states, head), retain_graph=True)
    scaled = torch.autograd.grad(-3 * loss / total, (states, head), retain_graph=True)
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(other, -3 * one / weights.sum())
    for one, other in zip(once, torch.autograd.grad(loss, (states, head)), strict=True):
        assert torch.equal(one, other)


def test_a_tied_embedding_collects_both_gradients() -> None:
    _, head, targets, weights = problem()
    tokens = targets.roll(1)
    loss, _ = cross_entropy(F.embedding(tokens, head).tanh(), head, targets, weights, chunk_tokens=5)
    loss.backward()
    assert head.grad is not None
    expected = plain(F.embedding(tokens, head).tanh(), head, targets, weights, None)
    torch.testing.assert_close(head.grad, torch.autograd.grad(expected, head)[0], atol=1e-5, rtol=1e-5)


def test_only_the_gradients_that_are_needed() -> None:
    states, head, targets, weights = problem()
    both = torch.autograd.grad(cross_entropy(states, head, targets, weights)[0], (states, head))
    alone = torch.autograd.grad(cross_entropy(states, head.detach(), targets, weights)[0], states)
    assert torch.equal(alone[0], both[0])
    alone = torch.autograd.grad(cross_entropy(states.detach(), head, targets, weights)[0], head)
    assert torch.equal(alone[0], both[1])
    with torch.no_grad():
        loss, _ = cross_entropy(states, head, targets, weights)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(states, head, targets, weights, None))


def test_tokens_of_weight_zero_may_hold_anything() -> None:
    states, head, targets, weights = problem()
    expected = torch.autograd.grad(cross_entropy(states, head, targets, weights)[0], (states, head))
    damaged = states.detach().clone()
    damaged[3], damaged[20] = math.nan, math.inf
    targets[3], targets[20] = -100, V + 5
    damaged.requires_grad_()
    got = torch.autograd.grad(cross_entropy(damaged, head, targets, weights)[0], (damaged, head))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert not got[0][3].any() and not got[0][20].any()


def test_a_batch_of_padding_only_is_zero() -> None:
    states, head, targets, weights = problem()
    loss, total = cross_entropy(states, head, targets, torch.zeros_like(weights))
    gradients = torch.autograd.grad(loss, (states, head))
    assert loss.item() == 0 and total.item() == 0 and not gradients[0].any() and not gradients[1].any()


def test_bfloat16_sums_in_float32() -> None:
    """log 5003 = 8.5178 is 8.5 in bfloat16; and 2,000 small gradients added in bfloat16 would stall."""
    states, head = torch.zeros(2000, 8, dtype=torch.bfloat16), torch.randn(5003, 8).bfloat16()
    loss, total = cross_entropy(states, head, torch.zeros(2000, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert (loss / total).item() == pytest.approx(math.log(5003), abs=1e-5)
    ones = torch.ones(2000, 8, dtype=torch.bfloat16)
    head = torch.zeros(64, 8, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = cross_entropy(ones, head, torch.zeros(2000, dtype=torch.int64), chunk_tokens=1)
    (gradient,) = torch.autograd.grad(loss, head)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient[1:].float(), torch.full((63, 8), 2000 / 64), rtol=1e-2, atol=0)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_bfloat16_is_as_near_to_float32_as_the_plain_loss(softcap: float | None) -> None:
    states, head, targets, weights = problem()
    reference = torch.autograd.grad(plain(states, head, targets, weights, softcap), (states, head))
    low = states.detach().bfloat16().requires_grad_(), head.detach().bfloat16().requires_grad_()
    got = torch.autograd.grad(cross_entropy(*low, targets, weights, softcap)[0], low)
    usual = torch.autograd.grad(plain(*low, targets, weights, softcap), low)
    for one, other, exact in zip(got, usual, reference, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - exact).norm() <= 1.2 * (other.float() - exact).norm()


def test_autocast_multiplies_in_its_dtype_and_gives_full_gradients() -> None:
    states, head, targets, weights = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = cross_entropy(states, head, targets, weights)
    gradients = torch.autograd.grad(loss, (states, head))
    rounded = cross_entropy(states.bfloat16(), head.bfloat16(), targets, weights)[0]
    assert loss.item() == rounded.item() != cross_entropy(states, head, targets, weights)[0].item()
    assert gradients[0].dtype == gradients[1].dtype == torch.float32


def test_huge_logits_stay_finite() -> None:
    states, head, targets, weights = problem()
    loss, _ = cross_entropy(states * 1e4, head, targets, weights)
    torch.testing.assert_close(loss, plain(states * 1e4, head, targets, weights, None))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (states, head)))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_log_probabilities(softcap: float | None) -> None:
    states, head, targets, _ = problem()
    scores = log_probabilities(states, head, targets, softcap, chunk_tokens=5)
    expected = plain_logits(states, head, softcap).log_softmax(-1)[torch.arange(N), targets]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.linspace(-2, 1, N)
    got = torch.autograd.grad(scores, (states, head), upstream)
    for one, other in zip(got, torch.autograd.grad(expected, (states, head), upstream), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert log_probabilities(states[:0], head, targets[:0]).shape == (0,)


def test_wrong_arguments_are_refused() -> None:
    states, head, targets, weights = problem()
    with pytest.raises(ValueError, match="flatten batch and time"):
        cross_entropy(states[None], head, targets, weights)
    with pytest.raises(ValueError, match=r"expected \(N, D\) and \(V, D\)"):
        cross_entropy(states, head[:, :5], targets, weights)
    with pytest.raises(ValueError, match=r"expected \(37,\) of int64"):
        cross_entropy(states, head, targets[:5], weights)
    with pytest.raises(ValueError, match="one per target"):
        cross_entropy(states, head, targets, weights[:5])
    with pytest.raises(ValueError, match="detach"):
        cross_entropy(states, head, targets, weights.requires_grad_())
    with pytest.raises(ValueError, match=r"the vocabulary is 0\.\.100"):
        log_probabilities(states, head, targets + V)
    with pytest.raises(ValueError, match="softcap is 0"):
        log_probabilities(states, head, targets, 0.0)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        cross_entropy(states, head, targets, chunk_tokens=0)


def test_chunks_shrink_as_the_vocabulary_grows() -> None:
    cpu = torch.device("cpu")
    assert default_chunk_tokens(6_144, cpu) > default_chunk_tokens(262_144, cpu) == 128


MEASURE = """
import json, resource, torch
import torch.nn.functional as F
from encore.objectives.losses import cross_entropy

torch.set_num_threads(1)
def highest():  # of this process alone: ru_maxrss would begin with that of the test process
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
def problem(n, v, d):
    head = (0.1 * torch.randn(v, d)).requires_grad_()
    return torch.randn(n, d, requires_grad=True), head, torch.randint(0, v, (n,))
small = problem(8, 64, 32)
cross_entropy(*small)[0].backward()
F.cross_entropy(small[0] @ small[1].T, small[2]).backward()
states, head, targets = problem(1024, 65_536, 32)
start = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
cross_entropy(states, head, targets)[0].backward()
chunked = highest() - start
states.grad = head.grad = None
F.cross_entropy(states @ head.T, targets).backward()
print(json.dumps({"chunked": chunked, "plain": highest() - start}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size from /proc")
def test_memory_is_a_small_fraction_of_the_plain_loss() -> None:
    """Peak resident size above the arguments, forward and backward; one (1,024, 65,536) of logits is 256 MiB."""
    run = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True)
    peak = json.loads(run.stdout)
    assert peak["plain"] > 2 * 1024 * 65_536 * 4, "the plain loss is not what it is thought to be"
    assert peak["chunked"] < 0.15 * peak["plain"], peak
