import numpy as np
import pandas as pd
import pytest

from moe_core.gates import GateError, check, parse, refuse_unknown


@pytest.fixture
def metrics():
    """1600 steps: a validation loss every 200 that falls from 7 to 3.5, and four shares, e3 off at step 1500 alone."""
    steps = np.arange(1, 1601)
    frame = pd.DataFrame({f"router/frac_srv_e{e}": np.float32(0.25 + 0.001 * e) for e in range(4)},
                         index=pd.Index(steps, name="step"))
    frame.loc[1500, "router/frac_srv_e3"] = 0.30
    frame["val/loss"] = np.where(steps % 200 == 0, 7 - 3.5 * steps / 1600, np.nan)
    frame["router/entropy_mean/layer_0"] = 1.0
    return frame


@pytest.mark.parametrize("line, state, value, at", [
    ("val/loss < 4.0 by 1400", "passed", 3.9375, 1400),
    ("val/loss < 4.0 by 1200", "failed", 4.375, 1200),
    ("val/loss < 3.0 by 1800", "not reached", 3.5, 1600),
    ("val/loss < 5 by 1800", "passed", 4.8125, 1000),  # already there
    ("val/loss < 4.0 at 1400", "passed", 3.9375, 1400),
    ("val/loss < 4.0 at 1600", "passed", 3.5, 1600),  # the last step there is
    ("val/loss < 4.0 at 1399", "failed", 4.375, 1200),
    ("val/loss < 4.0 at 2000", "not reached", 3.5, 1600),
    ("val/loss <= 3.5", "passed", 3.5, 1600),
    ("val/loss < 3.5", "failed", 3.5, 1600),
    ("val/loss in 3.9 +- 0.1 at 1400", "passed", 3.9375, 1400),
    ("val/loss in 4.0 +- 0.1 at 1400", "passed", 3.9375, 1400),
    ("val/loss > 3.4 from 0", "passed", 3.5, 1600),
    ("router/frac_srv_e* in 0.24..0.26 from 1400", "failed", 0.30, 1500),
    ("router/frac_srv_e* in 0.24..0.26 from 1501", "passed", 0.253, 1501),
    ("router/frac_srv_e* in 0.24..0.26 from 1700", "not reached", np.nan, 0),
    ("router/frac_srv_e0 in .25..0.3", "passed", 0.25, 1600),  # on the line, as float32
    ("router/frac_srv_e0 in 0.2...25", "passed", 0.25, 1600),
    ("router/frac_srv_e0 > 0.25", "failed", 0.25, 1600),
    ("router/frac_srv_e0 == 2.5e-1", "passed", 0.25, 1600),
    ("router/frac_srv_e1 == 0.251", "passed", 0.251, 1600),  # which float32 has not
    ("router/frac_srv_e1 >= 0.251", "passed", 0.251, 1600),
    ("router/frac_srv_e1 < 0.251", "failed", 0.251, 1600),
    ("router/frac_srv_e3 > 0.31 by 1600", "failed", 0.30, 1500),  # the nearest of all
    ("val/loss < 9 by 100", "not reached", np.nan, 0),
    ("[vr]*/[lf]* > 1 at 5", "failed", 0.25, 5),  # though of val/loss nothing is known
    ("router/entropy_mean/layer_* < 2 at step 5", "passed", 1.0, 5),
    ("router/entropy* < 2 at step 5", "not reached", np.nan, 0),  # a layer's is meant where it is named
])
def test_a_gate_is_passed_failed_or_not_reached_with_the_number_that_decided(metrics, line, state, value, at):
    (answer,) = check([line], metrics)
    assert (answer.state, answer.at) == (state, at)
    assert answer.value == pytest.approx(value, abs=2e-3, nan_ok=True)


def test_the_worst_of_many_metrics_is_named_and_counted(metrics):
    (answer,) = check("router/frac_srv_e* in 0.24..0.26 from 1400", metrics)
    assert answer.metric == "router/frac_srv_e3"
    assert answer.says == ("router/frac_srv_e3: 0.3 at step 1500; 1 of 201 logged steps are outside (1 of 4)")


@pytest.mark.parametrize("line, says", [
    ("val/loss < 5 by 1800", "first 4.812 at step 1000"),
    ("val/loss < 3 by 1800", "nearest 3.5 at step 1600; the run is at step 1600"),
    ("val/loss > 3.4 from 0", "nearest to the line 3.5 at step 1600; 8 logged steps, 3.5 to 6.562"),
    ("val/loss > 3.4 from 1601", "nothing is logged from step 1601 on; the run is at 1600")])
def test_an_answer_says_which_steps_it_is_of(metrics, line, says):
    assert check(line, metrics)[0].says == says


def test_a_metric_that_the_run_lacks_is_said_and_a_close_name_offered(metrics):
    (answer,) = check("router/frac_svr_e0 < 1", metrics)
    assert answer.state == "not reached"
    assert answer.says == "the run has no such metric; did you mean router/frac_srv_e0?"
    with pytest.raises(GateError, match=r"gate 'val/los < 4': the run has no such metric; did you mean val/loss\?"):
        refuse_unknown([parse("val/loss < 4"), parse("val/los < 4")], metrics)
    refuse_unknown([parse("router/frac_srv_e* < 1")], metrics)
    refuse_unknown([parse("val/loss < 4")], metrics.iloc[:0, :0])  # a run that has not begun


@pytest.mark.parametrize("line", ["val/loss", "val/loss < four", "val/loss < 4 until 1400", "< 4", "val/loss in 1-2",
                                  "val/loss < 4 by -3", "val/loss < 4 by 1400 or so", 4, "val/loss < nan"])
def test_a_line_that_is_no_gate_is_refused_with_the_form_of_one(line):
    with pytest.raises(GateError) as refused:
        parse(line)
    assert "must be METRIC < NUMBER or METRIC in LOW..HIGH" in str(refused.value)
    assert "\n" not in str(refused.value) and repr(line) in str(refused.value)


def test_an_empty_range_is_refused():
    with pytest.raises(GateError, match=r"the range 2\.\.1 is empty"):
        parse("val/loss in 2..1")
