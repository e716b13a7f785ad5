"""The benchmark's own promises: every side takes the same step, and one that fails leaves the rest standing."""

import argparse
import functools
import json
import sys

import pytest
import torch

from moe_core.bench import command, curves, sides
from moe_core.bench.harness import Side, built, interleave, peak_bytes, ratio
from moe_core.model import Transformer, experts
from moe_core.presets import preset

CPU = torch.device("cpu")


def arguments(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["--rounds", "2", "--seconds", "0", *words])


def test_a_side_that_fails_is_said_and_left_out(tmp_path):
    """When it is made, or later on; the others are timed in every round, and nothing is raised."""
    said, steps, tired = [], [], iter(range(4))

    def broken():
        raise ImportError("no such peer\nwith a long story")
    made = {"good": lambda: Side("good", lambda: steps.append(1), 10), "broken": broken,
            "tires": lambda: Side("tires", lambda: next(tired), 10),
            "twice": lambda: Side("twice", lambda: (steps.append(1), steps.append(1)), 20)}
    sides = built(made, CPU, warmup=1, say=said.append)
    kept = interleave(sides, 3, 0.0, CPU, say=said.append)
    assert [side.name for side in sides] == ["good", "tires", "twice"]
    assert said[-1] == "tires: given up, StopIteration: no reason given"
    assert [side.name for side in kept] == ["good", "twice"] and all(len(side.seconds) == 3 for side in kept)
    assert "broken: left out, ImportError: no such peer" in said
    kept[0].seconds, kept[1].seconds = [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]
    assert ratio(kept[1], kept[0]) == (2.0, 2.0, 2.0)  # tokens for tokens


def test_the_peak_is_what_a_step_makes_whatever_it_left_of_the_one_before():
    """Gradients that live on until the next step count once, and so does what comes and goes beside them."""
    kept = [torch.ones(1 << 20)]  # made where nobody looked

    def step():
        kept.clear()
        passing = torch.ones(3 << 20)
        kept.append(torch.ones(1 << 20))
        del passing
    step()
    assert peak_bytes(step, CPU) == peak_bytes(step, CPU) == 4 << 22


@pytest.mark.parametrize("family, changes", (
    ("Qwen3-MoE", {}), ("Qwen3-MoE", dict(top_k=2)), ("Mixtral", dict(qk_norm=False)), ("Qwen3 dense", {})))
def test_a_peer_has_the_shape_that_it_is_compared_in(family, changes):
    """As many weights as ours without its router bias and its gate on the attention, which no peer has."""
    config = preset("nano", router_bias=False, attn_gate="none", **changes)
    config = sides.dense_twin(config) if family == "Qwen3 dense" else config
    assert sides.peer_model(family, config).num_parameters() == Transformer(config.model, config.router).num_params()


def test_a_table_has_a_row_for_each_side_and_goes_to_json(tmp_path, capsys):
    """Ours, the peer and the dense twin on a small shape: tokens/s, MFU and ratio, on the screen and in the file."""
    out = tmp_path / "rows.json"
    words = "ours grouped,ours dense,Qwen3-MoE grouped_mm"
    command.main(arguments("--batch-size", "1", "--block-size", "16", "--only", words, "--json", str(out)))
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"ours grouped", "ours grouped again", "ours dense", "Qwen3-MoE grouped_mm"}
    assert all(row["tokens_s"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("card, dtype, said", [
    ("NVIDIA H100 80GB HBM3", torch.bfloat16, "the maker's 989.00"), ("NVIDIA H100 PCIe", torch.bfloat16,
     "the maker's 756.00"), ("NVIDIA H100 80GB HBM3", torch.float32, "the measured matmul 0.40")])
def test_the_mfu_is_of_the_very_card_and_of_the_type_that_is_computed_in(card, dtype, said, capsys):
    """What the maker states is of bfloat16, and of cards of one generation it differs."""
    config = preset("nano", n_layer=1, batch_size=1, block_size=16, gradient_accumulation_steps=1)
    about = {"device": card, "matmul_flops": 400.0}
    row, = command.compare(arguments("--only", "ours dense"), config, CPU, dtype, about)
    assert f"over {said} TFLOP/s" in capsys.readouterr().out
    dense = sides.dense_twin(config)
    flops = Transformer(dense.model, dense.router).flops_per_token() * row["tokens_s"]
    assert row["mfu"] == pytest.approx(flops / (float(said.split()[-1]) * 1e12))


def test_when_the_time_is_over_the_rows_so_far_stand_and_the_rest_is_named(tmp_path, capsys):
    """No side is begun after the given minutes but the first, which the ratios need."""
    out = tmp_path / "rows.json"
    command.main(arguments("--batch-size", "1", "--block-size", "16", "--only", "ours grouped", "--minutes", "0",
                           "--json", str(out)))
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["ours grouped"]
    assert "ours grouped again: left out, the 0 minutes are over" in capsys.readouterr().out


def test_where_the_peers_library_is_missing_ours_are_timed(monkeypatch, capsys):
    """A GPU box may have torch alone: one line says what is left out."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    command.main(arguments("--batch-size", "1", "--block-size", "16", "--only", "ours dense,Mixtral"))
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ours dense ") for line in said) == 1
    assert sum(line.startswith("Mixtral grouped_mm: left out, ModuleNotFoundError") for line in said) == 1


def test_the_dense_side_spends_what_the_routed_side_spends(tiny):
    """Equal FLOPs a token but for the router's own matrix, for K experts of any width."""
    for changes in (dict(), dict(top_k=2, norm_topk_prob=True)):
        config = tiny(**changes)
        routed, dense = (sides.ours(c, CPU, torch.float32, name="x") for c in (config, sides.dense_twin(config)))
        router = 6 * config.model.n_layer * config.model.d_model * config.model.n_experts
        assert routed.flops_per_token - dense.flops_per_token == router


def test_ways_that_agree_pass_and_one_that_does_not_is_named(tiny, monkeypatch, capsys):
    """Loss curves of all ways on a small model; then with experts whose loop is wrong by a tenth."""
    monkeypatch.setattr(curves, "STEPS", 6)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    rows = {row["name"]: row["difference"] for row in curves.table(tiny(), CPU, torch.float32)}
    assert set(rows) == {"eager", "eager again", "asked ahead", "activation_checkpointing", "compiled", "loop"}
    assert rows["eager again"] == rows["asked ahead"] == rows["activation_checkpointing"] == 0
    assert max(rows.values()) < 1e-4
    monkeypatch.setitem(experts.IMPLEMENTATIONS, "loop", lambda *given: 1.1 * experts.experts_loop(*given))
    monkeypatch.setitem(curves.WITHIN, torch.float32, 1e-4)
    with pytest.raises(ValueError, match=r"^loop: not the numbers of eager"):
        curves.table(tiny(), CPU, torch.float32)
    assert "largest difference" in capsys.readouterr().out
