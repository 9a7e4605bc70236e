"""What the library must not do with files from elsewhere, and what it may not rely on in the libraries below it."""

import ast
import functools
import json
import os
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers.comparison_folder import write_folder
from helpers.official import save_picture, write_coco
from helpers.runs import folder_of
from helpers.tiny import ARCHITECTURES, loss
from peft.tuners.lora import LoraModel
from peft.utils import hotswap

import structlora_pyg
from structlora_pyg import StructLoraConfig, StructLoraModel, get_structlora_model
from structlora_pyg.cli import main
from structlora_pyg.study import config as run_config
from structlora_pyg.study.report.records import read_comparison
from structlora_pyg.study.tasks import DataError
from structlora_pyg.study.tasks.picture_texts import read_captions
from structlora_pyg.study.train import train

TINY = ARCHITECTURES["llama"]
SOURCES = sorted(Path(structlora_pyg.__file__).parent.rglob("*.py"))

# Names beyond the documented interfaces that the library uses, where they live, and why. A test below notices when one
# of them goes away; anything not in this list fails the next test.
RELIED_ON = {
    "_register_custom_module": (peft.LoraConfig, "PEFT's experimental door for layers of one's own"),
    "_get_adapter_state_dict": (LoraModel, "what of a state dict PEFT saves"),
    "_pad_lora_weights": (hotswap, "gives adapters the rank that a compiled model is to take"),
    "_unload_and_optionally_merge": (LoraModel, "behind both unload and merge_and_unload"),
    "_load_from_state_dict": (torch.nn.Module(), "torch's way for modules with a state of their own"),
    "_custom_modules": (peft.LoraConfig(), "layers of one's own that a configuration has been given"),
    "_parameters": (torch.nn.Module(), "the parameter, where an attribute of its name is what stands for it"),
    "_conv_forward": (torch.nn.Conv2d, "a convolution with another weight of the same shape"),
    "_BatchNorm": (torch.nn.modules.batchnorm, "all kinds of batch normalisation"),
    "_C": (torch, "home of the next"),
    "_are_functorch_transforms_active": (torch._C, "parameters under torch.func are not what they are afterwards"),
    "_current_level": (torch.autograd.forward_ad, "the same in forward mode"),
    "_reset_state": (AcceleratorState, "a second run in one process may need another precision"),
    "_version": (torch.Tensor, "counts the writes into a parameter, and so optimizer steps of every kind"),
    "_exit": (os, "end of a worker whose parent was killed"),
    **{
        f"_{when}_hooks": (torch.nn.Module(), "a base layer with hooks has to be called, not computed past them")
        for when in ("forward", "forward_pre", "backward", "backward_pre")
    },
}


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    return [(f.name, node) for f in SOURCES for node in ast.walk(ast.parse(f.read_text(encoding="utf-8")))]


def test_private_names_of_other_libraries_are_only_those_listed() -> None:
    own = {n.name for _, n in nodes() if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.attr for _, n in nodes() if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {n.target.id for _, n in nodes() if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    used = {n.attr for _, n in nodes() if isinstance(n, ast.Attribute)}
    for _, node in nodes():
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("structlora_pyg"):
            used |= {alias.name for alias in node.names} | set(str(node.module).split("."))
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    documented = {"_asdict", "_fields", "_replace"}  # of named tuples
    assert private - (own - RELIED_ON.keys()) - documented == RELIED_ON.keys()


@pytest.mark.parametrize("name", RELIED_ON)
def test_what_is_relied_on_is_still_there(name: str) -> None:
    assert hasattr(RELIED_ON[name][0], name)


def test_no_loader_can_run_code() -> None:
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "os.system"}
    for file, node in nodes():
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            safe = called == "yaml.load" and ast.unparse(node.args[1]) == "LOADER"  # a SafeLoader, see below
            assert called not in forbidden or safe, f"{file}: {called}"
            assert called != "torch.load" or options["weights_only"] == "True", file
            assert called != "np.load" or options["allow_pickle"] == "False", file
            assert options.get("trust_remote_code", "False") in ("False", "trust_remote_code"), file
            assert options.get("shell", "False") == "False", file


def test_the_loader_of_settings_is_a_safe_one() -> None:
    assert issubclass(run_config.LOADER, yaml.SafeLoader | yaml.CSafeLoader)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on the path that leaves a mark when it is imported; its convolution is PyG's."""
    mark = tmp_path / "mark"
    text = f"open({str(mark)!r}, 'w').close()\nfrom torch_geometric.nn import GCNConv as Conv\n"
    (tmp_path / "trap_module.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    sys.modules.pop("trap_module", None)


@pytest.mark.parametrize(
    "place", [("coordinator", "conv"), ("filter", "kind"), ("graph", "transforms"), ("coordinator", "conv_kwargs")]
)
def test_a_checkpoint_cannot_have_code_imported(place: tuple[str, str], tmp_path: Path, trap: Path) -> None:
    config = StructLoraConfig(
        r=2, target_modules=TINY.targets, schedule={"warmup_steps": 0}, coordinator={"lift": "tangent"}
    )
    model = get_structlora_model(TINY.model(), config).train()
    loss(model, TINY.batch()).backward()
    model.save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "structlora_config.json"
    tree = json.loads(file.read_text())
    value = {"transforms": ["trap_module.Conv"], "conv_kwargs": {"conv": "trap_module.Conv"}}
    tree[place[0]][place[1]] = value.get(place[1], "trap_module.Conv")
    file.write_text(json.dumps(tree))
    asked = rf"code to be imported: {'.'.join(place)}=trap_module.Conv.* trust_remote_code"
    with pytest.raises(ValueError, match=asked):
        StructLoraModel.from_pretrained(TINY.model(), tmp_path / "adapter")
    assert not trap.exists()
    if place == ("coordinator", "conv"):
        StructLoraModel.from_pretrained(TINY.model(), tmp_path / "adapter", trust_remote_code=True)
        assert trap.exists()


@pytest.mark.parametrize(
    "place", ["encoding.size", "coordinator.hidden_channels", "coordinator.num_layers", "coordinator.conv_kwargs.K"]
)
def test_a_checkpoint_cannot_ask_for_more_memory_than_its_weights_need(place: str, tmp_path: Path) -> None:
    config = StructLoraConfig(r=2, target_modules=TINY.targets)
    get_structlora_model(TINY.model(), config).save_pretrained(str(tmp_path))
    file = tmp_path / "structlora_config.json"
    tree = json.loads(file.read_text())
    *path, last = place.split(".")
    functools.reduce(dict.__getitem__, path, tree)[last] = 10**12
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=rf"{place}=1000000000000, but structlora_state.safetensors holds \d+ numbers"):
        StructLoraModel.from_pretrained(TINY.model(), tmp_path)


def test_exporting_a_run_of_somebody_else_imports_no_code_unasked(make_config, tmp_path, trap, capsys) -> None:
    config = make_config(max_steps=2)
    train(config)
    file = folder_of(config) / "config.json"
    file.write_text(file.read_text().replace('"GCNConv"', '"trap_module.Conv"'))
    checkpoint = ["--checkpoint", str(folder_of(config) / "checkpoint-2")]
    command = ["export", *checkpoint, "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "coordinator.conv=trap_module.Conv is code" in capsys.readouterr().err
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    assert main([*command, "--trust-remote-code"]) == 0
    assert trap.exists()
    file.write_text("{")
    assert main(["export", *checkpoint, "--output", str(tmp_path / "other")]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_files_cannot_lead_out_of_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    secret = tmp_path / "secret.png"
    save_picture(secret, 0)
    coco = write_coco(tmp_path / "coco")
    captions = coco / "annotations" / "captions_train2017.json"
    first = json.loads(captions.read_text())["images"][0]["file_name"]
    captions.write_text(captions.read_text().replace(first, "../../secret.png"))
    with pytest.raises(DataError, match=r"secret\.png; expected only names of pictures inside of it"):
        read_captions(str(coco))
    (tmp_path / "mini").mkdir()
    row = {"split": "train", "file": str(secret), "captions": ["a cat"]}
    lines = [json.dumps({**row, "split": split}) for split in ("train", "val")]
    (tmp_path / "mini" / "captions.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"secret\.png; expected only names of pictures inside of it"):
        read_captions(str(tmp_path / "mini"))
    folder = write_folder(tmp_path / "results")
    grid = folder / "grids" / "ranks.json"
    tree = json.loads(grid.read_text())
    tree["cells"][0]["key"] = "../../secret"
    grid.write_text(json.dumps(tree))
    (found,) = read_comparison(folder)
    assert found.cells["state"][0] == "not run yet"  # a key is looked up, never opened
