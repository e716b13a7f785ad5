import moe_core as mc


def test_nano_learns_the_embedded_corpus_and_keeps_its_experts(tmp_path):
    """Default settings, 400 steps: validation cross-entropy under 4.6 nats, and routing that never collapses."""
    run = mc.Run.create(tmp_path / "nano", mc.preset("nano", device="cpu"), say=lambda line: None)
    run.step(400)
    rows = run.metrics()
    assert abs(rows["train/ce"].iloc[0] - 8.318) < 0.1  # ln 4096
    assert rows["val/loss"].dropna().iloc[-1] < 4.6
    assert rows["router/collapsed"].max() == 0
    assert rows["router/active_min"].iloc[-100:].min() == 8
    run.close()
