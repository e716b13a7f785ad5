import re

import pytest

from widgets.what_if import WhatIf


@pytest.fixture
def asked(tiny_run):
    """A run with a few steps, its what-if, and what the page would show."""
    def make(**changes):
        run = tiny_run(**changes)
        run.step(3)
        return run, WhatIf(run.preview)
    return make


def test_it_says_what_the_preview_says_in_the_mean_and_in_the_layer_at_its_end(asked):
    run, what_if = asked(dropless=False, capacity_factor=1.0, n_layer=3)
    what_if.show(("capacity_factor", 2.0))
    said, seen = what_if.widget.value, run.preview(capacity_factor=2.0)
    drops = re.search(r"<th>dropped</th><td>([\d.]+)% → <b>([\d.]+)%</b></td>"
                      r"<td>([\d.]+)% → <b>([\d.]+)%</b> <i>highest, layer ([\d →]+)</i>", said)
    assert float(drops[1]) / 100 == pytest.approx(seen.now["router/drop_frac_mean"], abs=6e-4)
    assert float(drops[2]) / 100 == pytest.approx(seen.then["router/drop_frac_mean"], abs=6e-4)
    for k, values in ((3, seen.now), (4, seen.then)):
        worst = max(values[f"router/drop_frac_mean/layer_{layer}"] for layer in range(3))
        assert float(drops[k]) / 100 == pytest.approx(worst, abs=6e-4)
        assert worst >= values["router/drop_frac_mean"]
    assert re.search(r"entropy, nats</th><td><i>([\d.]+) → \1</i>", said)  # capacity moves no probability
    assert "on the batch of step 3" in said


def test_each_metric_is_said_in_the_mean_and_in_its_worst_layer_now_and_then(asked):
    """At a temperature that sharpens: the lowest entropy, and the highest probability and demand. Nothing can drop."""
    run, what_if = asked(n_layer=3)
    what_if.show(("router_temp", 0.05))
    seen = run.preview(router_temp=0.05)
    rows = {re.sub("<[^>]*>", "", row) for row in re.findall("<tr>(.*?)</tr>", what_if.widget.value)[1:]}
    expected = set()
    for metric, words, form, end in (("entropy", "entropy, nats", "{:.3f}", min),
                                     ("top1_p", "top-1 probability", "{:.3f}", max),
                                     ("max_frac", "largest demand", "{:.1%}", max)):
        (now, a), (then, b) = (end((values[f"router/{metric}_mean/layer_{layer}"], layer) for layer in range(3))
                               for values in (seen.now, seen.then))
        means = (seen.now[f"router/{metric}_mean"], seen.then[f"router/{metric}_mean"])
        expected.add(words + " → ".join(map(form.format, means)) + " → ".join(map(form.format, (now, then)))
                     + f" {'lowest' if end is min else 'highest'}, layer {a if a == b else f'{a} → {b}'}")
    assert rows == expected
    title = re.search("<p>(.*?)</p>", what_if.widget.value)[1]
    assert title.startswith(f"<b>What if</b> Router temperature {seen.values_now['router_temp']:.3g} → <b>0.05</b>")


def test_what_cannot_be_known_is_said_instead_of_numbers(asked):
    """Alpha acts through training alone: no table of equal numbers, but the preview's own sentence."""
    _, what_if = asked()
    what_if.show(("load_balance_alpha", 0.2))
    assert "load_balance_alpha acts only through training" in what_if.widget.value
    assert "<table>" not in what_if.widget.value


def test_aiming_turns_nothing_and_letting_go_hides_it(asked):
    run, _ = asked()
    before, calls = run.knobs["router_temp"].value, []
    what_if = WhatIf(lambda **turn: calls.append(turn) or run.preview(**turn))
    for value in (0.5, 0.7, 0.9):
        for _ in range(2):  # held still it is routed once
            what_if.show(("router_temp", value))
        assert f"<b>{value}</b>" in what_if.widget.value
    what_if.show(None)
    assert what_if.widget.value == ""
    assert run.events().empty and len(calls) == 3
    assert (run.knobs["router_temp"].value, run.knobs["router_temp"].mode) == (before, "follow")


def test_before_a_first_step_and_without_a_preview_it_says_what_it_can(tiny_run):
    what_if = WhatIf(tiny_run().preview)
    what_if.show(("router_temp", 0.5))
    assert "no batch is at hand yet" in what_if.widget.value
    dense = WhatIf(None)
    dense.show(("lr_scale", 0.5))
    assert "Learning-rate scale → <b>0.5</b>" in dense.widget.value
