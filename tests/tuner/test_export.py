"""Export, merge, save and restore; and what they refuse."""

import copy
import dataclasses
import json

import pytest
import torch
from helpers.adapted import adapt, descend, full_config, train, with_all_stages
from helpers.slow import slow_but
from helpers.tiny import ARCHITECTURES, logits, loss
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch_geometric.nn import GCNConv, GraphConv
from torch_geometric.transforms import AddSelfLoops
from transformers import BertConfig, BertForQuestionAnswering

from structlora_pyg import IBFilter, StructLoraConfig, StructLoraModel, get_structlora_model
from structlora_pyg.config import CONFIG_FILE
from structlora_pyg.stage_config import PRESETS
from structlora_pyg.tuner.checkpoint import STATE_FILE
from structlora_pyg.tuner.export import ADAPTER_FILE
from structlora_pyg.tuner.layers import base_weight
from structlora_pyg.tuner.optim import parameter_groups

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
LIFTS = ["tangent", "project"]
TINY = ARCHITECTURES["llama"]


def active(tiny=TINY, **changes) -> StructLoraModel:
    """A model whose gates are partly closed and whose coordinator has a strong say."""
    model = train(adapt(tiny, **changes), tiny.batch())
    with torch.no_grad():
        filter_, *_, coordinator = model.graph_pass.stages
        filter_.gate_offset[::2, 0] = -1.0
        if coordinator.output.state_dict():  # bounded
            coordinator.gain.fill_(0.8)
    return model


def stock(folder, tiny=TINY) -> PeftModel:
    return PeftModel.from_pretrained(tiny.model(), str(folder)).eval()


def test_ragged_export_cuts_closed_directions_and_uniform_export_has_no_patterns(tmp_path) -> None:
    model = active(coordinator={"conv": "GCNConv", "lift": "tangent", "hidden_channels": 8}, r=3)
    with torch.no_grad():
        model.graph_pass.stages[1].gain.zero_()  # a message may revive a closed direction; none is sent here
    model.export(tmp_path / "uniform")
    model.export(tmp_path / "ragged", ragged=True)
    shapes = {
        kind: {v.size(0) for k, v in load_file(tmp_path / kind / ADAPTER_FILE).items() if "lora_A" in k}
        for kind in ("uniform", "ragged")
    }
    assert shapes == {"uniform": {3}, "ragged": {2, 3}}
    config = json.loads((tmp_path / "uniform" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (3, 4)


LAPLACIAN = {"name": "AddLaplacianEigenvectorPE", "k": 2, "is_undirected": True}
WALK = {"name": "AddRandomWalkPE", "walk_length": 2, "attr_name": "walk"}
TRAINED: dict[str, tuple[str, dict]] = {
    "ranks and scalings by pattern": ("llama", {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 20}}),
    "biases of adapted layers": ("roberta", {"bias": "lora_only"}),
    "all biases": ("roberta", {"bias": "all"}),
    "biases of the updates": ("gpt2", {"lora_bias": True}),
    "biases of updates of other scalings": ("gpt2", {"lora_bias": True, "alpha_pattern": {"h.0.attn.c_attn": 16}}),
    "learned edges": ("llama", {"graph": {"edges": "learned", "top_k": 2}}),
    "encodings": ("llama", {"graph": {"transforms": [LAPLACIAN, WALK]}}),
    "diffusion": ("llama", {"graph": {"transforms": ["GDC"]}}),
    "two hops": ("llama", {"graph": {"transforms": ["TwoHop"]}}),
    "a virtual node": ("llama", {"graph": {"transforms": ["VirtualNode"], "virtual_nodes": 1}}),
}


class Own(nn.Module):
    """A network as users of PyG write it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first, self.second = GraphConv(in_channels, 12), GraphConv(12, out_channels)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, edge_weight: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, edge_index, edge_weight).tanh(), edge_index, edge_weight)


def of_roles(conv, kind: str = "hetero_conv", conv_kwargs: dict | None = None, **graph) -> tuple[str, dict]:
    made = {"conv": conv, "hetero": kind, "hidden_channels": 8, "conv_kwargs": conv_kwargs or {}}
    return "llama", {"coordinator": made, "graph": {"refresh_every": 2, **graph}}


TRAINED |= {f"lift {lift}": ("llama", {"coordinator": {"lift": lift, "hidden_channels": 8}}) for lift in LIFTS}
TRAINED |= {
    "roles, GATv2Conv": of_roles("GATv2Conv", conv_kwargs={"heads": 2}, edges="hybrid"),
    "roles, learned edges": of_roles("GraphConv", edges="learned"),
    "roles, GCNConv": of_roles("GCNConv", edges="depth_chain"),  # within a role it is not bipartite
    "roles, a virtual node": of_roles("GraphConv", transforms=["VirtualNode"], virtual_nodes=1),
    "roles, a network of one's own": of_roles(Own, "to_hetero", edges="gradient", threshold=0.0),
}


@pytest.mark.parametrize("what", slow_but(TRAINED.keys() - {"all biases", "diffusion", "two hops"}, TRAINED))
def test_what_is_trained_is_exported_at_one_rank_in_files_that_run_no_code(what: str, tmp_path) -> None:
    name, changes = TRAINED[what]
    tiny = ARCHITECTURES[name]
    model = active(tiny, **changes)
    assert model.adapter_graph().validate(raise_on_error=True)
    with torch.no_grad():
        want, start = logits(model, tiny.batch()), logits(tiny.model(), tiny.batch())
        assert not torch.allclose(want, start, atol=1e-4)
        model.save_pretrained(str(tmp_path / "saved"))
        facts = model.export(tmp_path / "ragged", ragged=True)
        for folder in ("saved", "ragged"):
            torch.testing.assert_close(logits(stock(tmp_path / folder, tiny), tiny.batch()), want, atol=1e-5, rtol=1e-4)
        twin = StructLoraModel.from_pretrained(tiny.model(), tmp_path / "saved", trust_remote_code=True).eval()
        torch.testing.assert_close(logits(twin, tiny.batch()), want)
    written = {p.name for p in (tmp_path / "saved").iterdir()}
    assert written == {ADAPTER_FILE, "adapter_config.json", "README.md", STATE_FILE, CONFIG_FILE}
    ranks = {v.size(0) for k, v in load_file(tmp_path / "saved" / ADAPTER_FILE).items() if "lora_A" in k}
    assert ranks == {4 if "ranks" in what else 2}
    assert (facts["truncation_error"], facts["open_gates"] < 1) == (0.0, True)
    loss(model.train(), tiny.batch()).backward()
    assert all(p.grad is not None for p in model.graph_pass.parameters() if p.requires_grad)


@pytest.mark.parametrize("literal", [False, True])
def test_a_dense_lift_is_exported_and_merged_whole_and_cut_on_demand_with_a_word(literal, tmp_path, caplog) -> None:
    paper = with_all_stages({}, PRESETS["paper"]) if literal else {}
    model = active(**{**paper, "coordinator": {**paper.get("coordinator", {"conv": "GCNConv"}), "lift": "dense"}})
    if literal:
        graph = model.adapter_graph()
        assert (graph.message.norm(dim=1) > 0.1 * (graph.x - graph.message).norm(dim=1)).all()  # at full strength
    batch = TINY.batch()
    want = logits(model, batch)
    facts = model.export(tmp_path / "whole")
    assert facts["truncation_error"] == 0
    assert facts["rank"] == 18
    torch.testing.assert_close(logits(stock(tmp_path / "whole", TINY), batch), want, atol=1e-5, rtol=1e-4)
    assert not caplog.records
    assert 0 < model.export(tmp_path / "cut", rank=2)["truncation_error"] < 1
    assert "cut to rank 2" in caplog.text
    assert {v.size(0) for k, v in load_file(tmp_path / "cut" / ADAPTER_FILE).items() if "lora_A" in k} == {2}
    torch.testing.assert_close(logits(model.merge_and_unload().eval(), batch), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", slow_but([3], [2, 3, 4]))
def test_what_is_evaluated_is_exported_and_merged_also_where_the_warm_up_ends(steps, tmp_path) -> None:
    options = {"encoding": {"size": 4}, "schedule": {"warmup_steps": 3}}
    filter_ = {"init_logit": 0.0}  # half open: not the same as plain LoRA
    evaluated, other, third = (
        train(adapt(TINY, filter=filter_, **options), TINY.batch(), steps=steps) for _ in range(3)
    )
    with torch.no_grad():
        want = logits(evaluated, TINY.batch())
        evaluated.export(tmp_path / "evaluated")
        other.export(tmp_path / "other")  # without an evaluation before it
        for folder in ("evaluated", "other"):
            torch.testing.assert_close(logits(stock(tmp_path / folder), TINY.batch()), want, atol=1e-5, rtol=1e-4)
        merged = third.merge_and_unload().eval()
        torch.testing.assert_close(logits(merged, TINY.batch()), want, atol=1e-5, rtol=1e-4)


def test_export_is_idempotent_and_leaves_the_model_able_to_train(tmp_path) -> None:
    model = active()
    before = loss(model, TINY.batch())
    for folder in ("one", "two"):
        model.export(tmp_path / folder)
    for file in (ADAPTER_FILE, "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert loss(model, TINY.batch()) == before
    assert loss(train(model, TINY.batch(), steps=1), TINY.batch()) != before


def test_an_untrained_model_is_not_exported(tmp_path) -> None:
    model = adapt(TINY)
    with pytest.raises(RuntimeError, match="no optimizer step"):
        model.export(tmp_path)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for said in ("no optimizer step", "optimizer"):  # which holds other parameters
        loss(model.train(), TINY.batch()).backward()
        with pytest.raises(RuntimeError, match=said):
            model.export(tmp_path)
        optimizer.step()
    assert list(tmp_path.iterdir()) == []


def test_factors_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path) -> None:
    model = active()
    with torch.no_grad():
        next(model.graph_pass.adapters.parameters())[0, 0] = float("nan")
    for action in (lambda: model.export(tmp_path), model.merge_and_unload):
        with pytest.raises(ValueError, match="not finite"):
            action()
    assert list(tmp_path.iterdir()) == []


MERGED = {
    "shared base weights": {"layer_replication": [(0, 2), (0, 2)]},
    "tokens": {"trainable_token_indices": [*range(30)]},
}


@pytest.mark.parametrize("what", MERGED)
def test_what_is_shared_or_trained_beside_the_layers_is_merged_too(what: str) -> None:
    model = active(**MERGED[what])
    with torch.no_grad():
        want = logits(model, TINY.batch())
        torch.testing.assert_close(logits(model.merge_and_unload().eval(), TINY.batch()), want, atol=1e-5, rtol=1e-4)


def test_a_float64_base_is_merged_in_float64_also_from_within_the_warm_up_which_is_reported(tmp_path, caplog) -> None:
    base = TINY.model().double()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(torch.randn_like(p) * 1e-9)  # what float32 cannot hold
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    options = {"schedule": {"warmup_steps": 100}, "alarms": "off"}
    model = get_structlora_model(base, StructLoraConfig(r=2, lora_alpha=4, target_modules=TINY.targets, **options))
    descend(model.parameters(), lambda: loss(model, TINY.batch()), lr=0.0, kind=torch.optim.SGD)
    model.export(tmp_path)
    assert "warm-up" in caplog.text
    merged = model.merge_and_unload()  # lora_B is 0
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, before)


def test_a_saved_model_continues_exactly(tmp_path) -> None:
    undisturbed = active(lora_dropout=0.0)
    train(undisturbed, TINY.batch(), steps=2)  # moves past the state that active() set by hand
    undisturbed.save_pretrained(str(tmp_path))
    resumed = StructLoraModel.from_pretrained(TINY.model(), tmp_path)
    for model in (undisturbed, resumed):
        train(model, TINY.batch(), steps=5).state_dict()  # which counts the last step
    assert undisturbed.graph_pass.step == resumed.graph_pass.step
    state = undisturbed.state_dict()
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(undisturbed.graph_pass.graph.edge_index, resumed.graph_pass.graph.edge_index)


@pytest.mark.parametrize("other_active", [False, True])
def test_a_second_adapter_neither_enters_the_checkpoint_nor_takes_the_head(other_active: bool, tmp_path) -> None:
    tiny = ARCHITECTURES["roberta"]
    model = train(adapt(tiny, task_type="SEQ_CLS"), tiny.batch())
    with torch.no_grad():
        want = logits(model, tiny.batch())
    model.add_adapter("second", LoraConfig(r=2, target_modules=tiny.targets, modules_to_save=["classifier"]))
    if other_active:
        model.set_adapter("second")
        train(model, tiny.batch(), steps=2)
    with torch.no_grad():
        second = logits(model, tiny.batch()) if other_active else None
        model.save_pretrained(str(tmp_path))
        resumed = StructLoraModel.from_pretrained(tiny.model(), tmp_path).eval()
        torch.testing.assert_close(logits(resumed, tiny.batch()), want)
        torch.testing.assert_close(logits(stock(tmp_path, tiny), tiny.batch()), want)
        if second is not None:
            torch.testing.assert_close(logits(stock(tmp_path / "second", tiny), tiny.batch()), second)
        merged = model.merge_and_unload().eval()  # the active one, as by PEFT
        torch.testing.assert_close(logits(merged, tiny.batch()), want if second is None else second)


def test_adapters_are_saved_where_peft_saves_them_and_asked_for_by_name(tmp_path) -> None:
    config = StructLoraConfig(r=2, lora_alpha=4, target_modules=TINY.targets)
    model = get_structlora_model(TINY.model(), config, adapter_name="own")
    model.add_adapter("default", LoraConfig(r=2, target_modules=TINY.targets))
    model.save_pretrained(str(tmp_path))
    for folder, coordinated in ((tmp_path, False), (tmp_path / "own", True)):
        assert (folder / ADAPTER_FILE).is_file()
        assert (folder / STATE_FILE).is_file() == coordinated
    model.save_pretrained(str(tmp_path / "one"), selected_adapters=["own"])
    assert not (tmp_path / "one" / ADAPTER_FILE).is_file()
    with pytest.raises(ValueError, match=r"holds the adapter own, and this model's is default.*adapter_name"):
        StructLoraModel.from_pretrained(TINY.model(), tmp_path / "own")
    again = StructLoraModel.from_pretrained(TINY.model(), tmp_path / "own", adapter_name="own")
    with pytest.raises(ValueError, match="no training state"):  # a plain LoRA is no checkpoint
        again.load_adapter(str(tmp_path), "own")
    again.load_adapter(str(tmp_path), "other")
    assert "other" in again.peft_config


def test_damaged_or_foreign_checkpoints_are_refused_and_change_nothing(tmp_path) -> None:
    model = active()
    model.save_pretrained(str(tmp_path))
    before = {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}
    file = tmp_path / STATE_FILE
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        model.load_training_state(tmp_path)
    file.write_bytes(content)
    other = adapt(TINY, r=3)
    with pytest.raises(ValueError, match="does not fit"):
        other.load_training_state(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{ not json")
    with pytest.raises(ValueError, match="damaged"):
        StructLoraModel.from_pretrained(TINY.model(), tmp_path)
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        model.load_training_state(tmp_path / "nowhere")
    for key, value in model.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(value, before[key]), key


OBJECTS = {
    "coordinator.conv": lambda: {"coordinator": {"conv": GCNConv(8, 8)}},
    "coordinator.conv_kwargs": lambda: {"coordinator": {"conv": "GINConv", "conv_kwargs": {"nn": nn.Linear(8, 8)}}},
    "filter.kind": lambda: {"filter": {"kind": IBFilter(torch.ones(6, 2))}},
    "graph.transforms": lambda: {"graph": {"transforms": [AddSelfLoops(attr="edge_weight")]}},
}


@pytest.mark.parametrize("setting", OBJECTS)
def test_objects_that_no_file_holds_are_asked_for(setting: str, tmp_path) -> None:
    def built(setting: str) -> dict:
        given = OBJECTS[setting]()
        return {**given, "coordinator": {"hidden_channels": 8, **given.get("coordinator", {})}}

    model = active(**built(setting))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=rf"objects in {setting}, which .* cannot hold.*load_training_state"):
        StructLoraModel.from_pretrained(TINY.model(), tmp_path)
    resumed = adapt(TINY, **built(setting))
    resumed.load_training_state(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(resumed.eval(), TINY.batch()), logits(model, TINY.batch()))


def test_a_configuration_comes_back_from_a_checkpoint_and_not_from_an_export(tmp_path) -> None:
    model = active(graph={"edges": "depth_chain"})
    model.save_pretrained(str(tmp_path))
    config = StructLoraConfig.from_pretrained(tmp_path)
    assert dataclasses.asdict(config) == dataclasses.asdict(model.structlora_config)
    model.export(tmp_path / "export")
    with pytest.raises(FileNotFoundError, match=r"holds no structlora_config.json; it is not a checkpoint"):
        StructLoraConfig.from_pretrained(tmp_path / "export")


def test_shared_start_is_one_draw_a_role() -> None:
    model = adapt(ARCHITECTURES["llava"], init_lora_weights="shared")
    weights: dict[tuple, list] = {}
    for a in model.graph_pass.adapters:
        weight = model.graph_pass.adapters.layers[a.layer].lora_A["default"].weight
        weights.setdefault((a.role, a.in_features), []).append(weight)
    assert len(weights) == 4
    for group in weights.values():
        assert all(torch.equal(group[0], w) for w in group)
    firsts = [g[0] for g in weights.values() if g[0].size(1) == 32]
    assert not torch.equal(firsts[0], firsts[1])


def test_a_training_step_that_fails_leaves_the_base_as_it_was() -> None:
    base = TINY.model()
    config = StructLoraConfig(r=2, target_modules=TINY.targets, init_lora_weights="gradient")
    with pytest.raises(ZeroDivisionError):
        get_structlora_model(base, config, train_step=lambda: 1 / 0)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2_slices", "pyg_gps"])
def test_gradient_start_spans_the_top_singular_directions_of_the_gradient(name: str) -> None:
    tiny = ARCHITECTURES[name]
    batch, base = tiny.batch(), tiny.model()
    plain_loss = lambda model: logits(model, batch).square().sum()  # noqa: E731
    reference, seen = tiny.model(), {}
    for path, module in reference.named_modules():
        keep = lambda _, args, path=path: seen.update({path: args[0].detach().flatten(0, -2)})  # noqa: E731
        module.register_forward_pre_hook(keep) if hasattr(module, "weight") and not len(list(module.children())) else 0
    plain_loss(reference).backward()
    config = StructLoraConfig(r=2, target_modules=tiny.targets, fused_slices=tiny.slices, init_lora_weights="gradient")
    model = get_structlora_model(base, config, train_step=lambda: plain_loss(base).backward())
    for a in model.graph_pass.adapters:
        gradient = base_weight(reference.get_submodule(a.layer.replace(".base_layer", ""))).grad
        gradient = (gradient.T if "gpt2" in name else gradient)[a.rows]
        top = torch.linalg.svd(gradient)[2][:2]
        got = model.graph_pass.adapters.layers[a.layer].lora_A["default"].weight[a.ranks]
        overlap = torch.nn.functional.normalize(got, dim=1) @ top.T
        torch.testing.assert_close(overlap.abs(), torch.eye(2), atol=1e-2, rtol=0)
        if (inputs := seen.get(a.layer.replace(".base_layer", ""))) is None:  # an attention is no module that is called
            continue
        codes, usual = (inputs @ got.T).square().sum(), a.r * inputs.square().sum() / (3 * inputs.size(1))
        torch.testing.assert_close(codes, usual)  # in the mean those of PEFT's uniform start: no hidden learning rate
    fresh = tiny.model().state_dict()
    for key, value in model.get_base_model().state_dict().items():
        if "lora_" not in key:
            assert torch.equal(value, fresh[key.replace(".base_layer", "")]), key
    with torch.no_grad():
        torch.testing.assert_close(logits(model.eval(), batch), logits(tiny.model(), batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("slices", "rslora"), [("v", False), ("kv", False), ("kv", True)])
def test_slices_leave_the_rest_alone_and_are_scaled_as_layers_of_their_rank(slices, rslora, tmp_path) -> None:
    """One slice has the rank of its layer, and still not its rows."""
    tiny = ARCHITECTURES["gpt2_slices"]
    ranks = {"rank_pattern": {r"transformer\.h\.0\.attn\.c_attn": 4}, "use_rslora": rslora}
    model = train(adapt(tiny, fused_slices=[*slices], **ranks), tiny.batch())
    found = {(a.r, round(a.scaling, 6)) for a in model.graph_pass.adapters}
    assert found == {(r, round(4 / (r**0.5 if rslora else r), 6)) for r in (2, 4)}
    model.export(tmp_path)
    torch.testing.assert_close(logits(stock(tmp_path, tiny), tiny.batch()), logits(model, tiny.batch()))
    layer = next(iter(model.graph_pass.adapters.layers.values()))
    moved = layer.lora_B["default"].weight.abs().sum(1).view(3, -1).sum(1) > 0
    assert moved.tolist() == [name in slices for name in "qkv"]


class Alike(nn.Module):
    """Two layers whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.inner = nn.Linear(8, 8), nn.ModuleDict({"lin": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["lin"](self.lin(x).relu())


def test_ragged_ranks_of_names_that_end_alike_are_told_apart(tmp_path) -> None:
    torch.manual_seed(0)
    base, x = Alike(), torch.randn(16, 8)
    schedule, graph = {"warmup_steps": 0, "ramp_steps": 0}, {"edges": "full"}
    config = full_config(r=4, target_modules=["lin"], schedule=schedule, graph=graph)
    model = get_structlora_model(copy.deepcopy(base), config).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    model(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        model.graph_pass.stages[0].gate_offset[0, 1:] = -100  # closed in the outer layer alone
        model.graph_pass.stages[-1].gain.zero_()
    model.export(tmp_path, ragged=True)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(x), model.eval()(x))
    assert {m.r["default"] for m in loaded.modules() if isinstance(m, LoraLayer)} == {1, 4}


def test_a_bias_that_the_base_has_no_place_for_is_refused_before_anything_is_merged() -> None:
    model = active(lora_bias=True)
    before = [base_weight(layer).clone() for layer in model.graph_pass.adapters.layers.values()]
    with pytest.raises(RuntimeError, match="has no bias"):
        model.merge_and_unload()
    after = [base_weight(layer) for layer in model.graph_pass.adapters.layers.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_the_head_of_question_answering_is_trained_and_exported(tmp_path) -> None:
    base, ids, at = BertForQuestionAnswering(BertConfig(**SMALL)), torch.arange(16).view(2, 8), torch.tensor([1, 2])
    config = StructLoraConfig(r=2, target_modules=["query", "value"], task_type="QUESTION_ANS")
    model = get_structlora_model(copy.deepcopy(base), config)
    train(model, {"input_ids": ids, "start_positions": at, "end_positions": at}, steps=1).export(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).start_logits, model(input_ids=ids).start_logits)
    assert not torch.equal(base.qa_outputs.modules_to_save["default"].weight, base.qa_outputs.original_module.weight)
