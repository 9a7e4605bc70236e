"""What a configuration needs comes from the hub, here one of our own, and an export goes there."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from helpers.hub import serving
from peft import AutoPeftModelForSequenceClassification

from structlora_pyg.cli import main

LABELS = datasets.ClassLabel(names=["entailment", "not_entailment"])
GLUE = datasets.Features(
    {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"), "label": LABELS}
)


@pytest.fixture
def hub(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of a hub with MiniLM, as small as can be, and RTE; the command line is in an empty folder beside it."""
    folder = tmp_path / "hub"
    shutil.copytree(tiny_bert, model := folder / "models" / "sentence-transformers" / "all-MiniLM-L6-v2")
    (model / "onnx").mkdir()
    (model / "onnx" / "config.json").write_text("{}")
    (rte := folder / "datasets" / "nyu-mll" / "glue" / "rte").mkdir(parents=True)
    rows = {"sentence1": ["the cat sat"] * 20, "sentence2": ["a cat sat"] * 20, "label": [0, 1] * 10}
    for split in ("train", "validation", "test"):
        data = datasets.Dataset.from_dict(rows, features=GLUE)
        data.to_parquet(rte / f"{split}-00000-of-00001.parquet")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.delenv("STRUCTLORA_DATA", raising=False)
    with serving(folder) as address:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        url = address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (huggingface_hub.constants, huggingface_hub.file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", url, raising=False)
        yield folder


def test_an_export_is_uploaded_as_a_whole_or_the_hub_says_no_before_any_work(hub, tiny_bert, capsys) -> None:
    settings = ["data.max_length=16", f"model.path={tiny_bert}", f"data.path={hub}/datasets/nyu-mll/glue/rte"]
    assert main(["train", "rte", "--smoke", *settings]) == 0
    export = ["export", "--checkpoint", "runs/rte-smoke/checkpoint-3", "--output"]
    assert main([*export, "no", "--hub", "somebody/rte"]) == 2
    assert "--hub=somebody/rte cannot be written to (" in capsys.readouterr().err
    assert not Path("no").exists()
    assert main([*export, "out", "--hub", "me/rte"]) == 0
    assert capsys.readouterr().out.endswith("/me/rte\n")
    files = {file.name for file in Path("out").iterdir()}
    assert {file.name for file in (hub / "models/me/rte").iterdir()} == files >= {"README.md", "adapter_config.json"}
    AutoPeftModelForSequenceClassification.from_pretrained(hub / "models/me/rte")


def test_a_shipped_configuration_trains_on_what_the_hub_has(hub: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked = []

    def load(path: str, config: str) -> datasets.DatasetDict:
        asked.append((path, config))
        return load_dataset("parquet", data_dir=str(hub / "datasets" / path / config))

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)  # it would ask the real hub
    assert main(["fetch", "rte", "data.max_length=16"]) == 0
    assert capsys.readouterr().out == "20 examples for training, 20 for evaluation, and the model are here\n"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["train", "rte", "--smoke", "data.max_length=16"]) == 0
    assert main(["train", "rte", "--smoke", "data.max_length=16"]) == 0  # the folder of the last one is no obstacle
    assert set(asked) == {("nyu-mll/glue", "rte")}
    assert Path("runs/rte-smoke/adapter/adapter_model.safetensors").is_file()
    assert {f.name for f in Path.cwd().iterdir()} == {"runs"}
