"""What each rule of the guide says of a run that breaks it alone, and the turns that it offers, to the letter."""

import numpy as np
import pytest
from guide_runs import EXPERIMENT_1, LN8, healthy, put

from moe_core.health import findings, healthy_band

UP = ["load_balance_alpha 0.12 -> 0.15", "router_z_loss_coef 0.001 -> 0.005"]
APART = ["router_temp 1.30 -> 1.60", "router_noise_std 0.30 -> 0.55"]
ROOMIER = ["capacity_factor 1.25 -> 1.56", "router_temp 1.30 -> 1.60"]
FLAT = "step by step back once router/max_frac_max is under 0.40 for 100 steps, or if val/loss rises"
CALMER, CALM = ["lr_scale 1.00 -> 0.75", "grad_clip 1.00 -> 1.50"], "if train/ce falls more slowly after 200 steps"


def spoiled(n=600, **columns):
    """A healthy run whose last rows, as many as the values, have these of the router's metrics instead."""
    frame = healthy(n)
    for name, values in columns.items():
        put(frame, f"router/{name}", values, last=len(values))
    return frame


def clipped(part, recently):
    frame = healthy(1000)
    frame["grad/clipped_cum"] = np.concatenate([np.linspace(0, part * 1000 - 100 * recently, 900),
                                                part * 1000 - recently * np.arange(99, -1, -1)])
    return frame


FIFTY, GROWING = np.ones(50), np.linspace(0, 1, 100)


@pytest.mark.parametrize("frame, text, levers, undo", [
    (spoiled(max_frac_max=0.7 * FIFTY), "the fullest expert of the worst layer takes 0.70 sustained, above 0.50: bad "
     "(fair 0.125)", UP + APART, FLAT),
    (spoiled(max_frac_max=0.45 * FIFTY), "the fullest expert of the worst layer takes 0.45 sustained, above 0.40 "
     "(fair 0.125)", UP + APART, FLAT),
    (spoiled(max_frac_mean=0.7 * FIFTY), "the fullest expert takes 0.70 in the mean over layers, sustained above 0.50: "
     "severe (fair 0.125)", UP + APART, FLAT),
    (spoiled(max_frac_mean=0.38 * FIFTY), "the fullest expert takes 0.38 in the mean over layers, sustained above 0.35 "
     "(fair 0.125)", UP + APART, FLAT),
    (spoiled(top1_p_mean=0.9 * FIFTY), "too peaked, collapse likely: top-1 probability 0.90 sustained, above 0.80 "
     "(uniform 0.125)", APART, "once router/top1_p_mean is back under 0.60"),
    (spoiled(top1_p_mean=0.14 * FIFTY), "too diffuse: top-1 probability 0.140 sustained, under 1.2/E = 0.150 "
     "(uniform 0.125)", ["router_temp 1.30 -> 1.10", "router_noise_std 0.30 -> 0.15"],
     "if router/max_frac_max stays above 0.40"),
    (spoiled(entropy_mean=0.15 * LN8 * FIFTY), "entropy 0.31 nats sustained, below 0.2 ln E = 0.42: peaked", APART,
     "once router/entropy_mean is back above 0.42 nats"),
    (spoiled(entropy_mean=np.concatenate([0.4 - 0.3 * GROWING[::2], 0.1 - 0.05 * GROWING[::2]]) * LN8), "entropy 0.16 "
     "nats, under 0.1 ln E = 0.21 early and falling, is far below the healthy 0.2 ln E = 0.42: collapse likely",
     APART + UP, "once router/entropy_mean is back above 0.42 nats"),
    (spoiled(1100, entropy_mean=0.97 * LN8 * FIFTY), "under-specialised: entropy 2.02 nats is near ln E = 2.08 at step "
     "1100, above 0.96 ln E = 2.00", ["router_temp 1.30 -> 1.25", "load_balance_alpha 0.12 -> 0.10",
                                      "router_z_loss_coef 0.001 -> 0.0005"], "if router/max_frac_max stays above 0.40"),
    (spoiled(aux_mean=0.12 + 0.08 * GROWING, max_frac_mean=0.16 + 0.14 * GROWING), "the balance loss grows (0.1398 to "
     "0.1802) while the fullest expert's share worsens (0.19 to 0.27): balancing too weak", UP,
     "once router/aux_mean / alpha is back and flat for 100 steps, or if train/ce rises"),
    (spoiled(frac_srv_e3=0.045 * FIFTY, frac_srv_e5=0.03 * FIFTY), "expert 5 (and 1 more) is served 3.0% of the "
     "assignments sustained, under 5.0% (fair 12.5%)", UP + APART, "once every expert is above its line for 100 steps"),
    (spoiled(drop_frac_mean=0.04 * FIFTY), "4.0% of the assignments are dropped, sustained above 2%: capacity is too "
     "tight or the router too peaked", ROOMIER, "once router/drop_frac_mean is under 0.01 for 100 steps"),
    (spoiled(frac_srv_max=0.1 * FIFTY, frac_dem_max=0.2 * FIFTY), "demand stays above served: the fullest expert is "
     "asked for 0.20 and takes 0.10; capacity is too tight (or go dropless)", ROOMIER,
     "once demand and served are close for 100 steps"),
    (spoiled(active_min=[2, 2, 2]), "repeated dips to 2 active experts of 8, 3 in the last 50 logged steps: collapse "
     "begins", UP + APART, FLAT),
    (spoiled(active_min=[6, 8]), "dips to 6 active experts of 8, 1 in the last 50 logged steps", UP + APART, FLAT),
    (spoiled(collapsed=[1, 0], max_frac_max=[0.89, 0.5, 0.2]), "collapsed in 1 of the last 50 logged steps: one "
     "expert takes up to 0.50 of the assignments (fair 0.125)",
     ["router_temp 1.30 -> 2.50", "router_noise_std 0.30 -> 1.00", "load_balance_alpha 0.12 -> 0.15"],
     "step by step back once router/collapsed has been 0 for 100 steps"),
    (clipped(0.7, 0.3), "the gradient was clipped in 70% of all steps and in 30% of the last 50, healthy is under 5 to "
     "10 %: look for spikes and NaN, a lower rate, a longer warmup", CALMER, CALM),
    (clipped(0.3, 0.2), "the gradient was clipped in 30% of all steps and in 20% of the last 50, healthy is under 5 to "
     "10 %", CALMER, CALM),
    (clipped(0.3, 0.05), "the gradient was clipped in 30% of all steps, but only in 5% of the last 50: the count is "
     "flat, which is fine", [], ""),
    (spoiled(max_frac_mean=[0.4, 0.6, 0.2]), "a spike: the fullest expert took up to 0.60 in the mean over layers, in "
     "2 of the last 50 logged steps; above 0.35 it passes unless sustained", [], "")])
def test_a_rule_says_what_is_so_and_offers_the_turns_of_the_guide(frame, text, levers, undo):
    found = findings(frame.iloc[-200:], EXPERIMENT_1, 8)[0]
    assert found.text == text
    assert [lever.text for lever in found.levers] == levers
    assert all(lever.undo.startswith(undo) for lever in found.levers)
    assert str(found).endswith(f"to {found.last}]" + (f" try {'; '.join(levers)}" if levers else ""))


def test_what_is_healthy_at_eight_experts_is_what_the_guide_says():
    """Of a layer by itself what holds of the worst one; more experts have their own lines."""
    bands = {"top1_p_mean": (0.1875, 0.6), "max_frac_mean": (None, 0.25), "max_frac_max": (None, 0.4),
             "max_frac_mean/layer_3": (None, 0.4), "entropy_mean": (0.2 * LN8, 0.96 * LN8), "active_min": (7, 8),
             "active_mean/layer_0": (7, 8), "frac_srv_e7": (0.05, 0.35), "frac_srv_e7/layer_1": (0.05, 0.35),
             "drop_frac_mean": (None, 0.02), "collapsed": (None, 0.0)}
    for name, band in bands.items():
        assert healthy_band(f"router/{name}", 8) == pytest.approx(band), name
    assert healthy_band("router/frac_srv_e17", 64) == pytest.approx((0.4 / 64, 0.35 / 8))
    assert healthy_band("router/top1_p_mean", 4) == pytest.approx((0.375, 1 / 4 + 0.475 / 0.875 * 0.75))
    assert healthy_band("train/ce", 8) is healthy_band("router/active_mean", 8) is None
