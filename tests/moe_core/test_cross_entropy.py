"""Chunk by chunk against torch's cross-entropy of all logits in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from moe_core.model import cross_entropy
from moe_core.model.cross_entropy import linear_cross_entropy


@pytest.fixture(params=[False, True], ids=["in place", "one kernel"])
def head(request, monkeypatch):
    """Both forms of what lies between the products of a chunk."""
    monkeypatch.setattr(cross_entropy, "is_one_kernel", lambda x_ND: request.param)
    return linear_cross_entropy


def both(head, x, w, targets, scale=1.0):
    """Loss and gradients (of x, of w), ours and those of the plain way in float64."""
    out = []
    for f, dtype in ((head, None), (lambda x, w, t: F.cross_entropy(F.linear(x, w), t), torch.float64)):
        a, b = (v.detach().to(dtype or v.dtype).requires_grad_() for v in (x, w))
        loss = f(a, b, targets)
        (scale * loss).backward()
        out.append((loss.detach().double(), a.grad.double(), b.grad.double()))
    return out


@pytest.mark.parametrize("n, vocab", [(1, 3), (127, 50), (300, 5000), (513, 1031)])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_chunks_give_the_loss_and_both_gradients_of_all_at_once(head, n, vocab, dtype, close):
    """Any number of chunks, a last one that is not full, a scaled loss; to rounding of what is added up."""
    x, w = torch.randn(n, 16, dtype=dtype), torch.randn(vocab, 16, dtype=dtype)
    ours, plain = both(head, x, w, torch.randint(vocab, (n,)), scale=0.3)
    # A gradient may cancel to little, where the model is sure; its parts do not: 0.3 / n of the other factor.
    sizes = plain[0].clamp_min(1.0), 0.3 / n * w.abs().max(), 0.3 / n**0.5 * x.abs().max()
    for a, b, size in zip(ours, plain, sizes, strict=True):
        assert (a - b).abs().max() <= close * size


def test_in_bfloat16_the_loss_is_summed_in_float32(head, monkeypatch):
    """20,000 rows of bfloat16: the loss is within what rounding the inputs of the product costs, not 7 % off; so is the
    gradient of a float32 weight, added up over 157 chunks.
    """
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 1)
    x, w = torch.randn(20_000, 8).bfloat16(), torch.randn(40, 8)
    ours, plain = both(head, x, w, torch.randint(40, (20_000,)))
    assert abs(ours[0] - plain[0]) < 2e-3 * plain[0]
    assert (ours[2] - plain[2]).norm() < 0.01 * plain[2].norm()


def test_large_logits_do_not_overflow(head):
    """Logits in the thousands give the finite loss and gradient that they have."""
    x, w = 60 * torch.randn(200, 16), 60 * torch.randn(700, 16)
    ours, plain = both(head, x, w, torch.randint(700, (200,)))
    assert all(torch.isfinite(a).all() for a in ours)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=0)


def test_the_logits_are_never_held_whole():
    """No tensor that is made has more than one chunk of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n, vocab, width = 1024, 8192, 8
    most = cross_entropy.rows_of_a_chunk(vocab, torch.device("cpu"), torch.float32) * vocab

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.seen = max(Largest.seen, out.numel())
            return out

    x, w = torch.randn(n, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    with Largest():
        linear_cross_entropy(x, w, torch.randint(vocab, (n,))).backward()
    assert vocab < Largest.seen <= most < n * vocab


def test_without_gradients_none_are_made():
    """In evaluation the same loss from a product a chunk, not three, and nothing is kept."""
    x, w = (torch.randn(n, 16, requires_grad=True) for n in (300, 90))
    t = torch.randint(90, (300,))
    with torch.no_grad(), FlopCounterMode(display=False) as work:
        loss = linear_cross_entropy(x, w, t)
    assert loss.grad_fn is None and work.get_total_flops() == 2 * 300 * 16 * 90
    assert torch.equal(loss, linear_cross_entropy(x, w, t).detach())
