"""Parameters and FLOPs, computed from the structure, against those of real models."""

import pytest
import torch
from small_models import TINY, VARIANTS, batch, build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_core.model import count_params
from moe_core.presets import preset


@pytest.mark.parametrize("name, expected", [
    ("moe-203m", 202_952_528), ("dense-107m", 107_488_128), ("nano", None),
])
def test_presets_have_the_parameters_they_are_named_for(name, expected):
    """Counted on the meta device, and computed from the structure, to the last one."""
    config = preset(name)
    with torch.device("meta"):
        model = build(config)
    real = sum(p.numel() for p in model.parameters())
    assert real == model.num_params() == (expected or real)


@pytest.mark.parametrize("variant", VARIANTS)
def test_computed_size_is_the_real_one(variant):
    """The formula follows every choice of architecture."""
    config = TINY.replace(**VARIANTS[variant])
    assert count_params(config.model) == sum(p.numel() for p in build(config).parameters())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "capacity" not in v and "further" not in v])
def test_flops_are_those_that_torch_counts(variant):
    """Matrix products of forward and backward, counted as they run; the router included, norms not."""
    config = TINY.replace(**VARIANTS[variant])
    model, (tokens, targets) = build(config, experts_impl="loop"), batch(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, targets, return_logits=True).losses["ce"].backward()  # torch counts no product in place
    assert counter.get_total_flops() == tokens.numel() * model.flops_per_token()


def test_flops_of_the_203m_model():
    """435 MFLOP a token at 2048 tokens in the PaLM convention."""
    with torch.device("meta"):
        assert build(preset("moe-203m")).flops_per_token() == 435_142_656
