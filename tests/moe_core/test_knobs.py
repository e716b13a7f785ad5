import pytest

from moe_core.knobs import KNOBS, KnobError, Knobs, check_turn
from moe_core.optim import lr_shape
from moe_core.presets import preset


def test_schedules_are_linear_from_the_first_step_to_the_end_of_their_anneal():
    """Temperature goes from init at step 1 to final at step anneal + 1, noise to exactly 0, and both stay."""
    knobs = Knobs(preset("nano", router_temp_init=2.0, router_temp_final=1.0, router_temp_anneal_iters=10,
                         router_noise_std_init=0.8, router_noise_decay_iters=4))
    assert [knobs["router_temp"].at(s) for s in (1, 6, 11, 500)] == pytest.approx([2.0, 1.5, 1.0, 1.0])
    assert [knobs["router_noise_std"].at(s) for s in (1, 3, 5, 6)] == pytest.approx([0.8, 0.4, 0.0, 0.0])


def test_an_anneal_of_no_steps_starts_at_its_end():
    knobs = Knobs(preset("nano", router_temp_anneal_iters=0, router_temp_final=0.7, router_noise_decay_iters=0))
    assert knobs["router_temp"].at(1) == 0.7
    assert knobs["router_noise_std"].at(1) == 0.0


def test_a_ramp_moves_at_its_first_step_arrives_after_over_steps_and_stays():
    """Turned at step 5 with over=4: a quarter of the way at 5, there at 8, still there at 100."""
    knob = Knobs(preset("nano"))["lr_scale"]
    knob.turn("ramp", 3.0, 4, step=5)
    assert [knob.at(s) for s in (5, 6, 7, 8, 100)] == pytest.approx([1.5, 2.0, 2.5, 3.0, 3.0])
    knob.turn("ramp", 0.0, 2, step=7)  # from where the first ramp had come to at step 6
    assert [knob.at(s) for s in (7, 8)] == pytest.approx([1.0, 0.0])
    knob.turn("follow", None, None, step=9)
    assert knob.at(9) == 1.0


@pytest.mark.parametrize("iters", [0, 1, 5])
def test_a_ramp_before_the_first_step_starts_where_the_schedule_does(iters):
    """The schedule says nothing of a step 0: whatever its length, the ramp leaves from its value at step 1."""
    knobs = Knobs(preset("nano", router_temp_init=3.0, router_temp_final=1.0, router_temp_anneal_iters=iters))
    start = knobs["router_temp"].at(1)
    knobs["router_temp"].turn("ramp", 2.0, 4, step=1)
    ramp = [knobs["router_temp"].at(step) for step in range(1, 6)]
    assert ramp == pytest.approx([start + (2.0 - start) * min(k, 4) / 4 for k in range(1, 6)])


def test_what_holds_is_what_the_tensors_say():
    """read(step) puts into the 0-D tensors, in place, the very values that it returns."""
    knobs = Knobs(preset("nano"))
    before = dict(knobs.tensors)
    knobs["router_temp"].turn("hold", 1.25, None, step=1)
    values = knobs.read(1)
    assert values["router_temp"] == 1.25
    for name, tensor in knobs.tensors.items():
        assert tensor is before[name]
        assert tensor.item() == pytest.approx(values[name], rel=1e-6)


def test_a_model_has_only_the_knobs_that_act_on_it():
    assert list(Knobs(preset("dense-107m"))) == ["lr_scale", "grad_clip"]
    assert "capacity_factor" not in Knobs(preset("nano"))
    assert "capacity_factor" in Knobs(preset("nano", dropless=False))
    with pytest.raises(KnobError, match="router_tmep: unknown knob; this run's knobs are router_temp,"):
        Knobs(preset("nano"))["router_tmep"]


@pytest.mark.parametrize("turn, line", [
    (("router_temp", "hold", 0), "router_temp = 0: must be a number from 0.01 to 100"),
    (("router_temp", "hold", float("inf")), "router_temp = inf: must be a number from 0.01 to 100"),
    (("router_noise_std", "hold", -0.1), "router_noise_std = -0.1: must be a number from 0 to 100"),
    (("router_noise_std", "hold", "1"), "router_noise_std = '1': must be a number from 0 to 100"),
    (("lr_scale", "ramp", 1.0, 0), "lr_scale: over = 0: must be an integer, at least 1"),
    (("lr_scale", "ramp", 1.0), "lr_scale: over = None: must be an integer, at least 1"),
    (("lr_scale", "wobble", 1.0), "lr_scale: mode = 'wobble': must be 'follow', 'hold' or 'ramp'"),
    (("lr_scale", "follow", 1.0), "lr_scale: follow takes no value"),
    (("lr_scale", "follow", None, 5), "lr_scale: follow takes no value"),
    (("lr_scale", "hold", True), "lr_scale = True: must be a number from 0 to 100"),
])
def test_a_wrong_turn_is_refused_in_one_line(turn, line):
    with pytest.raises(KnobError) as refused:
        check_turn(*turn)
    assert str(refused.value).startswith(line)
    check_turn(turn[0], "hold", KNOBS[turn[0]].low), check_turn(turn[0], "ramp", KNOBS[turn[0]].high, 1)  # both are in


def test_the_rate_warms_up_linearly_then_falls_as_a_cosine_to_its_floor():
    """1/warmup at step 1, 1 at the end of warmup, half way down in the middle, the floor from the end on."""
    optim = preset("nano", learning_rate=1.0, min_lr=0.2, warmup_iters=10, lr_decay_iters=110).optim
    assert [lr_shape(optim, s) for s in (1, 10, 11, 61, 111, 999)] == pytest.approx([0.1, 1.0, 1.0, 0.6, 0.2, 0.2])


def test_the_rate_equals_the_users_log():
    """Iteration 400 of a legacy log printed lr 3.208e-04; it counts from 0."""
    optim = preset("moe-203m").optim
    assert optim.learning_rate * lr_shape(optim, 401) == pytest.approx(3.208e-4, rel=1e-4)
