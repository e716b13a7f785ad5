"""The passes of an attention layer that are our own, against what anyone would write first, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe_core.model import Transformer, causal, linear
from moe_core.model.causal import attention_in_blocks, causal_attention
from moe_core.model.norm import RMSNorm
from moe_core.model.rope import apply_rope, rope_tables


def gradients(function, inputs, weight):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad((y * weight.to(y.dtype)).sum(), leaves)]


def plain_attention(q, k, v):
    """Query by query, over the keys that it may see; head g of the keys serves the next H / G of the queries."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    rows = [(q[:, :, i : i + 1] @ k[:, :, : i + 1].mT / math.sqrt(q.shape[-1])).softmax(-1) @ v[:, :, : i + 1]
            for i in range(q.shape[2])]
    return torch.cat(rows, 2)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_in_blocks_is_attention(length, groups):
    """Values and all three gradients, at lengths around the size of a block, and with shared key heads."""
    q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, groups, groups))
    weight = torch.randn_like(q)
    expected = gradients(plain_attention, (q, k, v), weight)
    for got, want in zip(gradients(attention_in_blocks, (q, k, v), weight), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, within", [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
def test_attention_in_blocks_is_as_exact_as_its_type(dtype, within):
    """Its distance from float64 over its size, as torch's own kernel's."""
    q, k, v = (torch.randn(2, 4, 160, 32, dtype=torch.float64) for _ in range(3))
    weight = torch.randn_like(q)
    ours = gradients(attention_in_blocks, [t.to(dtype) for t in (q, k, v)], weight)
    for got, want in zip(ours, gradients(plain_attention, (q, k, v), weight), strict=True):
        assert (got.double() - want).norm() / want.norm() < within


def test_only_short_bfloat16_texts_go_block_by_block(monkeypatch):
    """Past LONGEST no S x S probabilities are kept; whichever way it goes, the numbers are about the same."""
    monkeypatch.setattr(causal, "LONGEST", 96)
    ways = []
    monkeypatch.setattr(causal, "attention_in_blocks", lambda *qkv: ways.append(qkv) or attention_in_blocks(*qkv))
    for length, dtype, within in ((96, torch.bfloat16, 0.02), (97, torch.bfloat16, 0.02), (96, torch.float32, 1e-5)):
        q, k, v = (torch.randn(1, 2, length, 8, dtype=dtype) for _ in range(3))
        expected = plain_attention(q.double(), k.double(), v.double())
        assert (causal_attention(q, k, v).double() - expected).norm() / expected.norm() < within
    assert [qkv[0].shape[2] for qkv in ways] == [96]


@pytest.mark.parametrize("shape", [(3, 7, 16), (2, 5, 3, 8)])
def test_the_norms_gradient_is_autograds(shape):
    """Of the input and of the weight, against the definition in float64; and a zero row stays finite."""
    x, g = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    x[0, 0] = 0
    norm = RMSNorm(shape[-1], 1e-5).double()
    torch.nn.init.normal_(norm.weight)
    weight = norm.weight.detach()
    got = gradients(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, weight), g)
    want = gradients(lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w, (x, weight), g)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_bfloat16_norm_is_rounded_once():
    """No worse than torch's, whose statistics are float32."""
    norm, x = RMSNorm(256, 1e-6), 3 + torch.randn(64, 256)
    torch.nn.init.normal_(norm.weight)
    exact = x.bfloat16().double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.detach().bfloat16().double()
    theirs = F.rms_norm(x.bfloat16(), norm.weight.shape, norm.weight.bfloat16(), 1e-6)
    ours = norm(x.bfloat16())
    assert ours.dtype is torch.bfloat16
    assert (ours.double() - exact).norm() <= 1.01 * (theirs.double() - exact).norm()


def test_rotation_turns_each_pair_by_its_angle():
    """As complex numbers, values and gradient; the product of two positions depends on their distance alone."""
    x, g = (torch.randn(2, 9, 3, 8, dtype=torch.float64) for _ in range(2))
    tables = rope_tables(9, 8, 100.0, x.device, torch.float64)
    angle = torch.outer(torch.arange(9.0), 100.0 ** (-torch.arange(0, 8, 2) / 8)).double()
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def as_complex(x):
        turned = torch.complex(x[..., :4], x[..., 4:]) * turn
        return torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(gradients(lambda x: apply_rope(x, tables), (x,), g), gradients(as_complex, (x,), g),
                               rtol=1e-6, atol=1e-6)  # the angles are float32
    exact, rounded = (rope_tables(600, 8, 1e4, x.device, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(exact, rounded, strict=True))  # position 257 too
    same = apply_rope(x[:1, :1].expand(1, 9, 3, 8), tables)
    products = (same[0, :, None] * same[0, None, :]).sum(-1)
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [dict(attn_gate="sigmoid_head", n_kv_heads=1), dict(bias=True)])
def test_layers_put_together_are_the_layers(tiny, monkeypatch, changes):
    """One product for q, k, v and gate, and for gate and up: the loss and every gradient as one by one."""
    config = tiny(n_experts=0, mlp="swiglu", **changes)
    model = Transformer(config.model, config.router, seed=3, compute_dtype=torch.float64).double()
    tokens = torch.randint(0, config.model.vocab_size, (2, config.model.block_size + 1))
    seen = []
    for together in (False, True):
        monkeypatch.setattr(linear, "is_one_product", lambda x, together=together: together)
        loss = model(tokens[:, :-1], tokens[:, 1:]).losses["ce"]
        seen.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*seen, rtol=1e-10, atol=1e-12)
