import json

import numpy as np
import pytest

from moe_core.cli import main
from moe_core.config import ConfigError, RunConfig
from moe_core.dialects.flags import FIELDS
from moe_core.presets import preset

REFUSED = [
    (dict(topk=2), "topk = 2: there is no such field; did you mean top_k?"),
    (dict(n_layer="4"), "n_layer = '4': must be an integer"),
    (dict(n_layer=True), "n_layer = True: must be an integer"),
    (dict(n_layer=np.float64(2)), "n_layer = 2.0: must be an integer"),
    (dict(learning_rate=10**400), f"learning_rate = {10**400}: must be a finite number"),
    (dict(seed=2**64), f"seed = {2**64}: must be at most 92233720368547758"),
    (dict(learning_rate=float("nan")), "learning_rate = nan: must be a finite number"),
    (dict(router_noise_std_init=-1), "router_noise_std_init = -1: must be at least 0"),
    (dict(router_temp_init=0), "router_temp_init = 0: must be more than 0"),
    (dict(router_temp_final=-0.5), "router_temp_final = -0.5: must be more than 0"),
    (dict(capacity_factor=0), "capacity_factor = 0: must be more than 0"),
    (dict(top_k=9), "top_k = 9: must be at most n_experts = 8"),
    (dict(norm_topk_prob=True), "norm_topk_prob = True: must be False when top_k = 1"),
    (dict(router_scores="sigmoid", norm_topk_prob=True), "norm_topk_prob = True: must be False when top_k = 1"),
    (dict(router_scores="tanh"), "router_scores = 'tanh': must be one of 'softmax', 'sigmoid'"),
    (dict(n_head=3), "d_model = 128: must be divisible by n_head = 3"),
    (dict(n_kv_heads=3), "n_kv_heads = 3: must divide n_head = 4"),
    (dict(expert_width=30), "expert_width = 30: must be a multiple of 8"),
    (dict(router_noise_type="cauchy"), "router_noise_type = 'cauchy': must be one of 'gumbel', 'gaussian'"),
    (dict(n_experts=0, n_shared_experts=1), "n_shared_experts = 1: must be 0 where n_experts"),
    (dict(min_lr=1.0), "min_lr = 1.0: must be at most learning_rate = 0.003"),
    (dict(max_steps=1, max_iters=2), "max_iters = 2: given twice"),
    (dict(dataset_name=" "), "dataset_name = ' ': must not be empty"),
]


@pytest.mark.parametrize("fields, line", REFUSED, ids=[str(next(iter(f))) + str(i) for i, (f, _) in enumerate(REFUSED)])
def test_a_wrong_field_is_refused_in_one_line_that_names_it(fields, line):
    """Each refusal is one line: the field, the value, what would be right."""
    with pytest.raises(ConfigError) as refused:
        preset("nano", **fields)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="preset = 'micro': must be one of 'nano', 'moe-203m', 'moe-top2', 'dense-"):
        preset("micro")


def test_numbers_of_numpy_become_pythons_own():
    """Integers, floats and truth values, so that the config goes through JSON; blanks between mirrors go."""
    config = preset("nano", n_layer=np.int64(3), learning_rate=np.float32(0.5), qk_norm=np.bool_(False),
                    n_kv_heads=np.uint8(2), mirrors=" wandb, tensorboard")
    values = config.model.n_layer, config.optim.learning_rate, config.model.qk_norm, config.model.n_kv_heads
    assert [(type(value), value) for value in values] == [(int, 3), (float, 0.5), (bool, False), (int, 2)]
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.mirrors == "wandb,tensorboard"


def test_steps_and_values_may_be_numpys(tiny_run, tmp_path):
    """A cell of run.metrics() is as good as a literal wherever a run takes a number."""
    run = tiny_run()
    run.step(np.int64(4))
    run.note("here", step=run.metrics().index[1])
    run.knobs["lr_scale"].ramp(to=np.float32(0.5), over=np.int16(2))
    run.rewind(np.int64(3))
    choice = run.ab({"lr_scale": np.float32(2.0)}, {}, steps=np.int64(1))
    child = run.fork(tmp_path / "child", np.int64(3), grad_clip=np.float64(2.0))
    child.close()
    assert (run.current_step, choice.steps, child.config.optim.grad_clip) == (4, 1, 2.0)
    assert (run.replay(upto=np.int32(2))["largest"] == 0).all()
    assert run.events("main")["step"].tolist() == [2, 5]


@pytest.mark.parametrize("name", ["nano", "moe-203m", "dense-107m"])
def test_a_config_survives_json(name):
    """from_dict is the inverse of to_dict through real JSON, for every preset with changed fields."""
    config = preset(name, seed=7, max_steps=3, n_kv_heads=1)
    assert config.optim.max_iters == 3
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_says_what_it_means(capsys):
    """Its default and a meaning are in help() and in `moe train --help`."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for name in FIELDS:
        (line,) = [line.strip() for line in RunConfig.__doc__.splitlines() if line.strip().startswith(f"{name} = ")]
        assert len(line.partition(": ")[2]) > 5 and line in shown, line
