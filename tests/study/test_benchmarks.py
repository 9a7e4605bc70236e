"""The cost studies count and measure what they say, and their guard can fail."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.adapted import full_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from structlora_pyg import get_structlora_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import closing  # noqa: E402
import growth  # noqa: E402
import reach  # noqa: E402
import scale  # noqa: E402
import speed  # noqa: E402
import timing  # noqa: E402

TINY = {
    "targets": "q_proj,v_proj", "width": 64, "dtype": "float32", "tokens": 16, "layers": 2, "batch": 2, "r": 2,
    "compile": False, "checkpointing": True, "threads": 1, "device": "cpu",
}  # fmt: skip


def llama(shape: scale.Shape, heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=heads, num_key_value_heads=heads * shape.kv_width // shape.width,
        vocab_size=shape.vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), scale.LINEAR])
def test_the_formulas_of_scale_count_a_model_that_is_built_and_run(targets: tuple[str, ...]) -> None:
    shape = scale.Shape(layers=3, width=128, inner=256, kv_width=64, vocabulary=100)
    base = llama(shape, heads=4)
    assert sum(p.numel() for p in base.parameters()) == shape.parameters()
    assert sum(p.numel() for p in base.model.layers[0].parameters()) == shape.block()
    config = full_config(r=4, lora_alpha=8, target_modules=list(targets), graph={"edges": "depth_chain"})
    model = get_structlora_model(base, config)
    found, graph, trained = scale.count(shape, targets, r=4), model.adapter_graph(), model.parameter_counts()
    assert (graph.num_nodes, graph.num_edges) == (found["nodes"], found["chain_edges"])
    assert trained["adapter"] == found["adapter_parameters"]
    assert trained["training_only"] == found["training_only_parameters"]
    assert sum(4 * t.numel() for t in (graph.x, graph.code_A, graph.code_B)) == found["code_bytes"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.graph_pass()
    assert 0.5 < counter.get_total_flops() / found["graph_flops_forward"] <= 1.05  # the code may need fewer products


@pytest.mark.parametrize("name", ["Llama-2 7B", "Llama-3 70B"])
def test_the_largest_models_have_the_parameters_that_are_counted(name: str) -> None:
    shape = scale.SHAPES[name]
    with torch.device("meta"):
        base = llama(shape, heads=shape.width // 128)
    assert sum(p.numel() for p in base.parameters()) == shape.parameters()


def test_the_page_on_scale_shows_what_the_command_prints() -> None:
    assert scale.table() in (ROOT / "docs" / "evidence" / "scale.md").read_text()


@pytest.mark.slow  # what make speed-check does too
def test_every_system_takes_steps_and_is_compared_with_stock_lora(tmp_path: Path) -> None:
    table = speed.measure(TINY, None, rounds=2)
    assert list(table["systems"]) == list(speed.makers(TINY))
    assert table["clock"] == "processor time"
    for name, row in table["systems"].items():
        assert row["ratio"] > 0
        assert row["memory"] > 0.5
        assert sum(row["parts"].values()) == pytest.approx(1, abs=0.3)
        assert ("graph_pass" in row) == (name.startswith(("StructLoRA", "fused LoRA")))
    table["merged"] = speed.merged_inference(TINY, rounds=2)
    assert table["merged"]["same_modules"]


@pytest.mark.slow
def test_the_script_for_a_gpu_measures_every_shape_and_notes_what_fails(tmp_path, monkeypatch) -> None:
    import gpu

    options = ["--tiny", "--device", "cpu", "--rounds", "2", "--modes", "eager", "CUDA graphs"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options, "--json", str(tmp_path / "gpu.json")])
    gpu.main()
    tables = json.loads((tmp_path / "gpu.json").read_text())["tables"]
    assert {t["shape"] for t in tables if "systems" in t} == set(gpu.SHAPES)
    assert all(("error" in t) == (t["mode"] == "CUDA graphs" and not torch.cuda.is_available()) for t in tables)


def test_the_guard_of_speed_names_what_became_slower() -> None:
    good = {name: {"least": most, "least_graph_pass": 0.004} for name, most in speed.LIMITS.items()}
    good[speed.DROPOUT] = {"least": 1.3}
    good["fused LoRA, dropout"] = {"least": 1.3 * 0.9}
    good["StructLoRA"]["memory"] = speed.MEMORY_LIMIT
    assert speed.check({"systems": good}) == []
    slow = {"least_graph_pass": 0.1, "memory": 1.1}
    bad = {name: {"least": row["least"] + 0.2, **slow} for name, row in good.items()}
    bad[speed.DROPOUT] = {"least": 1.0}
    assert len(speed.check({"systems": bad})) == len(speed.LIMITS) + len(speed.DROPOUT_LIMITS) + 3


def test_the_page_on_speed_shows_the_stored_comparisons(tmp_path: Path) -> None:
    page = (ROOT / "docs/evidence/speed.md").read_text()
    for name in ("peers", "sizes", "bf16", "cores"):
        tables = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["tables"]
        assert speed.page_table(tables).join(speed.marks(name)) in page
    row = {"least": 0.9, "memory": 1.0, "lesson": 3.0, "graph_pass_ms": 0.4}
    (tmp_path / "speed.md").write_text(page)
    speed.fill(tmp_path / "speed.md", "peers", [{"setting": TINY, "systems": {"StructLoRA": row}}])
    assert "| StructLoRA | 0.90 (1.000) |" in (tmp_path / "speed.md").read_text()


@pytest.mark.slow
def test_closing_nothing_changes_nothing_and_closing_half_does(tiny_llama: Path, tmp_path: Path) -> None:
    (text := tmp_path / "text.txt").write_text("It rained all day and the cat slept. " * 400)
    rows = closing.measure(str(tiny_llama), str(text), seeds=1, steps=4, count=8, held=2)
    assert [row["share"] for row in rows] == 2 * [*closing.SHARES]
    for none, *_, half in (rows[:4], rows[4:]):
        assert none["least"] == none["random"] != half["least"] != half["random"]


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    with timing.Peak() as peak:
        for _ in range(5):
            kept = torch.zeros(1000)
            kept = kept + 1
    assert peak.most == 8000  # the old one and the new one
    assert kept.numel() == 1000


@pytest.mark.slow
def test_growth_is_measured_from_real_graph_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--most", "64", "--repeats", "1", "--conv", "GCNConv", "--device", "cpu"]
    files = ["--json", str(tmp_path / "growth.json"), "--figure", str(tmp_path / "growth.png")]
    monkeypatch.setattr(sys, "argv", ["growth.py", *options, *files])
    growth.main()
    curves = json.loads((tmp_path / "growth.json").read_text())["curves"]
    assert [c["grows"] for c in curves] == list(growth.SIZES)
    assert curves[0]["sizes"] == [16, 64]
    assert curves[0]["bytes"][1] > 3 * curves[0]["bytes"][0]
    assert growth.exponent([1, 2, 4, 8], [1.0, 4.0, 16.0, 64.0]) == pytest.approx(2)


@pytest.mark.parametrize("lift", reach.LIFTS)
def test_every_lift_passes_messages_on(lift: str) -> None:
    assert reach.reach(24, lift) > 0


def test_the_readme_says_what_the_stored_comparison_does() -> None:
    tables = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text())["tables"]
    least = {name: sorted(t["systems"][name]["least"] for t in tables) for name in ("StructLoRA", speed.DROPOUT)}
    said = "A step takes {:.2f} to {:.2f} of one of stock LoRA, whose dropout takes {:.2f} to {:.2f}"
    assert said.format(*least["StructLoRA"], *least[speed.DROPOUT]) in (ROOT / "README.md").read_text()
