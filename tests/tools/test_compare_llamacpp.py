"""tools/compare_llamacpp.py, as far as it needs no llama.cpp: ceilings, the choice of settings, the table, the words when it is missing."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import compare_llamacpp as tool  # noqa: E402
import llamacpp_peer as peer  # noqa: E402
import make_checkpoint  # noqa: E402

SIZES = {"dim": 64, "hidden": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "experts": 4, "vocab": 384, "positions": 512, "layers": 2}


class FakePeer:
    """Speeds made up: repacking doubles it, flash attention costs a tenth, micro-batches of 256 are best."""

    def __init__(self):
        self.calls = []

    def speed(self, path, work, settings, positions):
        self.calls.append((work, settings))
        if settings.ubatch == 1024:
            raise peer.PeerError("too large")
        return 100 * (2 if settings.repack else 1) * (0.9 if settings.flash else 1) * (1.1 if settings.ubatch == 256 else 1)


def test_attention_operations_count_what_a_prompt_needs():
    """Every pair of a query and an earlier key costs 4 operations an element of a head; the last layer needs the last query's alone."""
    config = make_checkpoint.make_config(**SIZES)
    pairs = sum(token + 1 for token in range(10)) * (config.n_layers - 1) + 10
    assert tool.attention_operations(config, 10) == 4 * 4 * 16 * pairs


def test_settings_are_the_fastest_of_those_tried():
    """Each setting is tried with the best of the others found so far, and one that fails is never chosen."""
    fake = FakePeer()
    best, tried = peer.best_settings(fake, Path("x"), peer.Work("prefill", 2048), peer.Settings(), 4096, 60.0, lambda text: None)
    assert best == peer.Settings(repack=True, flash=False, ubatch=256)
    assert {row["ubatch"] for row in tried} == {128, 256, 512, 1024, 2048}
    deep = peer.Work("decode", 32, 32768)
    best, _ = peer.best_settings(fake, Path("x"), deep, peer.Settings(repack=False), 40000, 60.0, lambda text: None)
    assert best == peer.Settings(repack=False, flash=False)
    assert max(work.depth for work, _ in fake.calls) == 8192


def test_nothing_is_tried_when_time_is_up():
    """Without time the settings stay what they were."""
    best, tried = peer.best_settings(FakePeer(), Path("x"), peer.Work("decode", 64), peer.Settings(), 64, -1.0, lambda text: None)
    assert best == peer.Settings() and tried == []


def test_missing_llamacpp_is_told_in_a_line(tmp_path):
    """A Python without llama-cpp-python gives an error that names what to install."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(peer.PeerError, match="pip install llama-cpp-python"):
        peer.WorkerPeer(str(script), 2, 384).speed(tmp_path / "x.gguf", peer.Work("decode", 4), peer.Settings(), 64)


def test_table_holds_medians_and_spread():
    """A row shows the medians, the least and most of ratio and share, and llama.cpp's settings in words."""
    turns = [{"ratio": 1.4, "share_of_ceiling": 0.8}, {"ratio": 1.6, "share_of_ceiling": 0.9}]
    row = {"npmix": 30.0, "llamacpp": 20.0, "ratio": 1.5, "ceiling": 35.0, "share_of_ceiling": 0.85, "turns": turns}
    row["llamacpp_settings"] = {"repack": True, "flash": False, "ubatch": 512}
    line = list(tool.table({"decode": row}))[1]
    for word in ("decode", "30.0", "20.0", "1.50 (1.40-1.60)", "85 % (80-90)", "repacked, flash attention off"):
        assert word in line
