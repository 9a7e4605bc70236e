"""Any LoRA folder of PEFT can be looked at, without its base model."""

import json

import pytest
import torch
from helpers.adapted import adapt, randomise, stock, train
from helpers.tiny import ARCHITECTURES
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model

from structlora_pyg import GraphBuilder, adapter_structure, inspect_adapter
from structlora_pyg.cli import main

TINY = ARCHITECTURES["llama"]


@pytest.mark.parametrize(
    "options", [{}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 9}}, {"use_rslora": True}]
)
def test_structure_is_that_of_the_model_it_came_from(options, tmp_path) -> None:
    model = stock(tmp_path, **options)
    want, got = adapter_structure(model), inspect_adapter(tmp_path).structure
    order = [want.names.index(name) for name in got.names]
    torch.testing.assert_close(got.gram, want.gram[order][:, order])
    assert got.adjacent_cosine == pytest.approx(want.adjacent_cosine)
    assert got.drift_energy == pytest.approx(want.drift_energy)


def test_norms_and_effective_ranks_are_those_of_the_dense_updates(tmp_path) -> None:
    model = stock(tmp_path)
    found = inspect_adapter(tmp_path)
    for a, norm, rank in zip(found.adapters, found.norm, found.effective_rank, strict=True):
        dense = model.get_base_model().get_submodule(a.layer).get_delta_weight("default").double()
        assert float(norm) == pytest.approx(float(dense.norm()), rel=1e-5)
        p = torch.linalg.svdvals(dense)[:4]
        p = p / p.sum()
        assert float(rank) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-4)


def test_an_exported_adapter_shows_its_closed_directions(tmp_path) -> None:
    model = train(adapt(TINY, r=4, coordinator={"conv": "none"}), TINY.batch())
    with torch.no_grad():
        model.graph_pass.stages[0].gate_offset[:, 1:] = -1.0
    model.export(tmp_path)
    found = inspect_adapter(tmp_path)
    torch.testing.assert_close(found.effective_rank, torch.ones(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.redundancy, torch.full((6,), 0.75), atol=1e-3, rtol=0)


def test_identical_layers_are_found_to_be_most_alike(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    stock(tmp_path)
    graph = inspect_adapter(tmp_path).graph
    assert graph.validate(raise_on_error=True)
    assert [n.split(".")[2] for n in graph.name] == list("001122")  # in the order of their numbers
    assert graph.num_edges == 8
    file = tmp_path / "adapter_model.safetensors"
    state, name = load_file(file), "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    state |= {name.format(2, side): state[name.format(0, side)].clone() for side in "AB"}
    save_file(state, file)
    one, two, cosine = inspect_adapter(tmp_path).most_alike(1)[0]
    assert {one.split(".")[2], two.split(".")[2]} == {"0", "2"}
    assert cosine == pytest.approx(1.0)


def test_the_command_prints_draws_and_reports(tmp_path, capsys) -> None:
    stock(tmp_path / "adapter")
    files = ["--graph", str(tmp_path / "graph.svg"), "--similarity", str(tmp_path / "similarity.png")]
    assert main(["inspect", str(tmp_path / "adapter"), *files]) == 0
    text = capsys.readouterr().out
    for part in ("6 adapters", "adjacent-layer cosine", "effective rank", "most alike"):
        assert part in text
    assert (tmp_path / "graph.svg").stat().st_size > 1000
    assert (tmp_path / "similarity.png").stat().st_size > 1000


def test_folders_that_are_not_lora_are_named(tmp_path, capsys) -> None:
    ia3 = get_peft_model(TINY.model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    ia3.save_pretrained(str(tmp_path / "ia3"))
    stock(tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    stock(tmp_path / "none")
    (tmp_path / "none" / "adapter_model.safetensors").unlink()
    stock(tmp_path / "config")
    (tmp_path / "config" / "adapter_config.json").write_text(json.dumps({"peft_type": "NOTHING"}))
    cases = {
        "ia3": "not a LoRA", "cut": "damaged", "none": "safetensors", "config": "cannot be read",
        "x": "no adapter_config",
    }  # fmt: skip
    for folder, message in cases.items():
        assert main(["inspect", str(tmp_path / folder)]) == 2
        assert message in capsys.readouterr().err
    assert main(["inspect"]) == 2
    assert "required: adapter" in capsys.readouterr().err


def test_the_graph_of_any_peft_model_or_folder_comes_in_one_call(tmp_path) -> None:
    model = stock(tmp_path)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), base := TINY.model())
    one, two = GraphBuilder.from_model(model)(), GraphBuilder.from_model(tmp_path)()
    torch.testing.assert_close(one.x, two.x)
    assert torch.equal(one.edge_index, two.edge_index)
    assert GraphBuilder.from_model(base, edges="full")().num_edges == 3 * 2
    own = adapt(TINY, encoding={"size": 16})
    randomise(own)
    builder = GraphBuilder.from_model(own)
    torch.testing.assert_close(builder().x, own.graph_pass.graph().x)
    with pytest.raises(ValueError, match="no adapter"):
        GraphBuilder.from_model(TINY.model())
