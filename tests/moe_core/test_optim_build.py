"""What build_optimizer puts where, at which rate, and what it refuses; how far a step is said to move a group."""

import pytest
import torch
from torch import nn

from moe_core import preset
from moe_core.config import ConfigError
from moe_core.model import Transformer
from moe_core.optim import build_optimizer, lr_shape, measured_step, parameter_groups, set_lr, update_sizes

OPTIMIZERS = ("adamw", "muon_adamw", "muon_sophia", "sophia")


def meta_model(name: str, **changes) -> tuple:
    config = preset(name, **changes)
    with torch.device("meta"):
        return config, Transformer(config.model, config.router)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["nano", "moe-203m", "dense-107m"])
def test_every_parameter_is_in_exactly_one_group_of_its_rule(name, optimizer):
    """By name, written out here: what Muon gets, what decays, and the peak rate of every parameter."""
    config, model = meta_model(name, optimizer=optimizer, embed_lr=7e-4)
    groups = build_optimizer(config.optim, model).param_groups
    home = {p: group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(home) == len(list(model.parameters()))
    for path, p in model.named_parameters():
        group, leaf = home[p], path.removesuffix(".weight").split(".")[-1]
        matrix = leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w_gate", "w_up",
                          "w_down")
        aux = "sophia" if "sophia" in optimizer else "adamw"
        rule = "muon" if matrix and "muon" in optimizer else aux
        peak = {"muon": 3e-2, "sophia": 1e-3, "adamw": config.optim.learning_rate}[rule]
        assert group["rule"] == rule, path
        assert group["peak_lr"] == (7e-4 if path in ("embed.weight", "positions.weight") else peak), path
        decay = {"muon": 1e-2, "sophia": 0.2, "adamw": 0.1}[rule]
        assert group["weight_decay"] == (decay if p.ndim > 1 else 0.0), path


def test_every_setting_of_a_group_is_its_own_field_of_the_config():
    """Numbers that are all different; Sophia's bs counts the predictions of one micro-batch, as its passes do."""
    muon = dict(muon_lr=0.02, muon_wd=0.03, muon_momentum=0.8, muon_scale="match_rms_adamw", muon_dtype="float32",
                starved_experts="skip")
    sophia = dict(sophia_lr=0.004, sophia_wd=0.05, sophia_b1=0.6, sophia_b2=0.7, sophia_rho=0.08, sophia_eps=1e-9)
    adamw = dict(learning_rate=0.0011, weight_decay=0.12, beta1=0.83, beta2=0.94)
    batch = dict(batch_size=3, gradient_accumulation_steps=5, block_size=7)
    expected = {
        "muon": dict(peak_lr=0.02, weight_decay=0.03, momentum=0.8, scale="match_rms_adamw", ns_dtype="float32",
                     starved="skip"),
        "sophia": dict(peak_lr=0.004, weight_decay=0.05, betas=(0.6, 0.7), rho=0.08, eps=1e-9, bs=21),
        "adamw": dict(peak_lr=0.0011, weight_decay=0.12, betas=(0.83, 0.94), eps=1e-8)}
    for optimizer in OPTIMIZERS:
        config, model = meta_model("nano", optimizer=optimizer, **muon, **sophia, **adamw, **batch)
        for group in build_optimizer(config.optim, model).param_groups:
            wanted = expected[group["rule"]] | ({"weight_decay": 0.0} if group["name"] == "vectors" else {})
            assert {name: group[name] for name in wanted} == wanted, (optimizer, group["name"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_biases_are_vectors_and_a_dense_block_beside_routed_ones_is_an_mlp(optimizer):
    """No bias decays or goes to Muon, the experts' stacks of them included; dense matrices are a group of their own."""
    config, model = meta_model("nano", optimizer=optimizer, bias=True, skip_first_n_moe=1)
    groups = {group["name"]: group for group in build_optimizer(config.optim, model).param_groups}
    biases = [p for name, p in model.named_parameters() if "bias" in name or ".b_" in name]
    vectors = set(groups["vectors"]["params"])
    assert len(biases) == 4 * 5 + 3 + 3 * (1 + 3) and vectors.issuperset(biases)
    assert groups["vectors"]["weight_decay"] == 0.0 and groups["vectors"]["rule"] != "muon"
    assert len(groups["mlp"]["params"]) == 3 and len(groups["experts"]["params"]) == 9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_shared_experts_are_matrices_that_every_token_meets(optimizer):
    """Three of each routed block, in the group of dense MLPs and under its rule; no stack of experts among them."""
    config, model = meta_model("nano", optimizer=optimizer, n_shared_experts=2, skip_first_n_moe=1, bias=True)
    groups = {group["name"]: group for group in build_optimizer(config.optim, model).param_groups}
    shared = [p for name, p in model.named_parameters() if ".shared." in name and p.ndim == 2]
    assert len(shared) == 9 and set(groups["mlp"]["params"]).issuperset(shared)
    assert len(groups["mlp"]["params"]) == 9 + 3 and groups["mlp"]["rule"] == groups["attention"]["rule"]


def test_the_routers_place_is_an_option():
    """Its matrix goes to Muon when asked, its bias never; under AdamW alone the option changes nothing."""
    for optimizer, place, rule in (("muon_adamw", "aux", "adamw"), ("muon_adamw", "muon", "muon"),
                                   ("muon_sophia", "muon", "muon"), ("adamw", "muon", "adamw")):
        config, model = meta_model("nano", optimizer=optimizer, router_optimizer=place)
        groups = {g["name"]: g for g in build_optimizer(config.optim, model).param_groups}
        assert groups["router"]["rule"] == rule
        assert all(p.ndim == 1 for p in groups["vectors"]["params"])
        assert len(groups["router"]["params"]) == 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_ratio_of_two_rates_never_changes(optimizer):
    """Over the whole schedule and beyond, at any lr_scale: every group's rate is its peak times one share."""
    config, model = meta_model("nano", optimizer=optimizer, embed_lr=5e-2, muon_lr=1e-2)
    built = build_optimizer(config.optim, model)
    floor = config.optim.min_lr / config.optim.learning_rate
    for step in range(1, config.optim.max_iters + 50):
        share = lr_shape(config.optim, step)
        assert min(floor, 1 / config.optim.warmup_iters) <= share <= 1
        set_lr(built, share * 0.3)
        assert {round(group["lr"] / group["peak_lr"], 12) for group in built.param_groups} == {round(share * 0.3, 12)}


def test_a_model_that_cannot_be_grouped_is_refused():
    """No matrix for Muon; a parameter whose module no rule knows."""
    config, model = meta_model("nano", optimizer="muon_adamw", n_experts=0)
    model.blocks = nn.ModuleList()
    with pytest.raises(ConfigError, match="optimizer = 'muon_adamw': the model has no matrix for Muon"):
        build_optimizer(config.optim, model)
    model.head = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"parameter head\.weight: must be in one optimizer group, not in 0"):
        parameter_groups(model)


@pytest.mark.parametrize("changes, line", [
    (dict(optimizer="lion"), "optimizer = 'lion': must be one of 'adamw', 'muon_adamw', 'muon_sophia', 'sophia'"),
    (dict(muon_lr=0), "muon_lr = 0: must be more than 0"),
    (dict(sophia_lr=-1.0), "sophia_lr = -1.0: must be more than 0"),
    (dict(embed_lr=0.0), "embed_lr = 0.0: must be more than 0"),
    (dict(sophia_k=0), "sophia_k = 0: must be at least 1"),
    (dict(sophia_b2=1.0), "sophia_b2 = 1.0: must be less than 1"),
    (dict(sophia_rho=0), "sophia_rho = 0: must be more than 0"),
    (dict(starved_experts="drop"), "starved_experts = 'drop': must be one of 'reference', 'skip'"),
    (dict(router_optimizer="sgd"), "router_optimizer = 'sgd': must be one of 'aux', 'muon'"),
])
def test_a_wrong_field_of_the_optimizer_is_refused_in_one_line(changes, line):
    with pytest.raises(ConfigError) as refused:
        preset("nano", **changes)
    assert str(refused.value) == line


def test_update_sizes_are_those_of_the_whole_groups():
    """RMS of the change over RMS of the weights: exact for a small group, within 5 % for a sampled one."""
    torch.manual_seed(0)
    big, small = nn.Parameter(torch.randn(512, 704)), nn.Parameter(torch.randn(40, 7))
    optimizer = torch.optim.SGD([{"params": [big], "lr": 0.1}, {"params": [small], "lr": 0.3}])
    assert update_sizes(optimizer, torch.device("cpu")).tolist() == [0.0, 0.0]
    before = [p.detach().clone() for p in (big, small)]
    for p in (big, small):
        p.grad = torch.randn_like(p) * torch.rand(p.shape[1])
    measured_step(optimizer)
    exact = [float((p.detach() - b).norm() / b.norm()) for p, b in zip((big, small), before, strict=True)]
    sizes = update_sizes(optimizer, torch.device("cpu")).tolist()
    assert sizes[0] == pytest.approx(exact[0], rel=0.05)
    assert sizes[1] == pytest.approx(exact[1], rel=1e-5)
