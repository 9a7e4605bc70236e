"""The counts of docs/evidence/scale.md are those of models that are built."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from structlora_pyg import StructLoraConfig, get_structlora_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


def llama(shape) -> LlamaForCausalLM:
    heads = 4
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads * shape.kv_width // shape.width,
            vocab_size=shape.vocabulary,
            tie_word_embeddings=False,
        )
    )


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), None])
def test_the_formulas_count_a_model_that_is_built_and_run(targets, scale: ModuleType) -> None:
    targets = targets or scale.LINEAR
    shape = scale.Shape(layers=3, width=128, inner=256, kv_width=64, vocabulary=100)
    base = llama(shape)
    assert sum(p.numel() for p in base.parameters()) == shape.parameters()
    block = base.model.layers[0]
    assert sum(p.numel() for p in block.parameters()) == shape.block()
    config = StructLoraConfig(r=4, lora_alpha=8, target_modules=list(targets), schedule={"warmup_steps": 0})
    model = get_structlora_model(base, config)
    found = scale.count(shape, targets, r=4)
    graph = model.adapter_graph()
    assert (graph.num_nodes, graph.num_edges) == (found["nodes"], found["chain_edges"])
    trained = model.parameter_counts()
    assert trained["adapter"] == found["adapter_parameters"]
    assert trained["training_only"] == found["training_only_parameters"]
    codes = [graph.x, graph.code_A, graph.code_B]
    assert sum(4 * t.numel() for t in codes) == found["code_bytes"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.graph_pass()
    ratio = counter.get_total_flops() / found["graph_flops_forward"]
    assert 0.5 < ratio <= 1.05  # the code may come to need fewer products than the plain form counts


def test_the_largest_models_have_the_parameters_that_are_counted(scale: ModuleType) -> None:
    for shape in (scale.SHAPES["Llama-2 7B"], scale.SHAPES["Llama-3 70B"]):
        with torch.device("meta"):
            base = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=shape.width,
                    intermediate_size=shape.inner,
                    num_hidden_layers=shape.layers,
                    num_attention_heads=shape.width // 128,
                    num_key_value_heads=shape.kv_width // 128,
                    vocab_size=shape.vocabulary,
                    tie_word_embeddings=False,
                )
            )
        assert sum(p.numel() for p in base.parameters()) == shape.parameters()


def test_the_page_shows_what_the_command_prints(scale: ModuleType) -> None:
    assert scale.table() in (ROOT / "docs" / "scale.md").read_text()
    assert json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text()) == scale.rows()
