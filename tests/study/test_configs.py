"""Every shipped configuration is valid and trains: on real data where they are, with a tiny model everywhere."""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import official
from helpers.slow import slow_but
from safetensors.torch import load_file

from structlora_pyg.study import shipped_configs
from structlora_pyg.study.config import RunConfig, load_config, parse_config
from structlora_pyg.study.run_folder import config_to_dict
from structlora_pyg.study.tasks.sentences import LAYOUTS, read_examples
from structlora_pyg.study.train import smoke, train

ADAPTER = "adapter/adapter_model.safetensors"
TIMM = "test_vit"  # timm's own architecture for tests: a VisionTransformer with a fused qkv, as ViT-B/16 and DeiT
SMALL = ["train.max_steps=2", "train.batch_size=2", "train.eval_batch_size=4", "adapter.schedule.warmup_steps=0"]
REAL = ("rte", "mrpc", "cola", "stsb", "wnli", "boolq", "piqa", "stories", "cifar100")  # small data, small models
DATA: dict[str, Callable[[Path], Path]] = {
    "boolq": official.write_boolq, "piqa": official.write_piqa, "cifar100": official.write_cifar,
    "image_folder": official.write_image_folder, "captions": official.write_coco, "vqa": official.write_vqa,
}  # fmt: skip
GLUE = [name for name in LAYOUTS if name not in ("boolq", "piqa")]
OFFLINE = ("digits", "graphs")  # they bring data and model themselves; test_demo.py trains them
# One of GLUE's tasks for all: test_tasks.py trains each.
RUNS = [(name, None) for name in shipped_configs() if name not in OFFLINE and name not in GLUE[1:]]
RUNS += [("roberta_glue", "stsb")]
USUAL = [("roberta_glue", "stsb"), *((n, None) for n in ("rte", "piqa", "stories", "imagenet", "llava7b_vqav2"))]


@pytest.fixture(scope="module")
def models(tiny_bert: Path, vit_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a tiny model for each hub id or path of a shipped configuration."""
    folder = tmp_path_factory.mktemp("models")
    llama = official.save_llama(folder / "llama")
    return {
        "minilm_l6_fp16": tiny_bert, "stories260k": llama, "huggyllama/llama-7b": llama,
        "llava-hf/llava-1.5-7b-hf": official.save_llava(folder / "llava"),
        "FacebookAI/roberta-base": official.save_roberta(folder / "roberta"),
        "timm/vit_base_patch16_224.augreg_in21k": vit_file, "deit_tiny/deit_tiny_patch16_224.safetensors": vit_file,
    }  # fmt: skip


def small_data(task: str, folder: Path) -> Path:
    if task in GLUE:
        return official.write_glue(folder, task)
    if task == "text":
        official.write_lines(folder / "text.txt", ["It rained all day and the cat slept."] * 40)
        return folder
    return DATA[task](folder)


def test_every_task_and_every_model_of_the_paper_has_a_shipped_configuration() -> None:
    own = {*LAYOUTS, *OFFLINE, "stories", "cifar100", "imagenet"}
    paper = {"llama7b_boolq", "llama7b_piqa", "llava7b_coco", "llava7b_vqav2", "roberta_glue"}
    assert set(shipped_configs()) == {*own, *paper, "vit_b16_cifar100", "vit_b16_imagenet"}


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_is_valid_and_survives_being_stored(name: str) -> None:
    config = load_config(name)
    assert config.train.output_dir == f"runs/{name}"
    stored, problems = parse_config(RunConfig, json.loads(json.dumps(config_to_dict(config))))
    assert problems == []
    assert config_to_dict(stored) == config_to_dict(config)


@pytest.mark.parametrize(
    "name", [n for n in shipped_configs() if n.startswith(("llama7b", "llava7b", "roberta", "vit"))]
)
def test_the_paper_s_hyper_parameters_are_kept(name: str) -> None:
    config = load_config(name)
    assert (config.adapter.r, config.adapter.lora_alpha) == (8, 16)
    assert (config.train.weight_decay, config.train.warmup_ratio) == (0.01, 0.06)
    assert config.train.lr in (1e-4, 2e-4, 5e-4)
    assert config.train.batch_size * config.train.gradient_accumulation_steps in (16, 32, 64)


@pytest.mark.parametrize(("name", "task"), slow_but(USUAL, RUNS), ids=lambda value: str(value or ""))
def test_a_shipped_configuration_trains_a_tiny_model_of_its_architecture(name, task, models, tmp_path) -> None:
    overrides = [*SMALL, f"train.output_dir={tmp_path / 'run'}", *([f"data.task={task}"] if task else [])]
    config = load_config(name, overrides)
    if config.data.task == "captions" and not (shutil.which("java") and importlib.util.find_spec("pycocoevalcap")):
        pytest.skip("CIDEr needs Java and pycocoevalcap")
    config.model.path = str(models[config.model.path])
    config.data.path = str(small_data(config.data.task, tmp_path / "data"))
    if config.model.path == str(models["minilm_l6_fp16"]):
        config.data.max_length = min(config.data.max_length, 128)
    if config.model.library == "timm":
        config.model.architecture, config.data.image_size = TIMM, 32
    results = train(config)
    assert math.isfinite(results["metrics"][results["metric"]])
    weights = load_file(tmp_path / "run" / ADAPTER)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights if ".lora_" in name}
    expected = {"llava7b": {"q_proj", "v_proj"}}.get(name.split("_")[0], set(config.adapter.target_modules))
    assert adapted == expected
    assert not any("vision" in name for name in weights)


@pytest.mark.parametrize("name", slow_but(["stsb"], REAL))
def test_a_shipped_configuration_trains_on_real_data(name, real_data, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STRUCTLORA_DATA", str(real_data))
    monkeypatch.chdir(tmp_path)
    if name == "stories":  # the user brings the text; here it is that of the questions' passages
        examples, _ = read_examples("boolq", "boolq")
        Path("stories.txt").write_text("\n".join(e.second for e in examples[:60]))
    results = train(smoke(load_config(name)))
    assert math.isfinite(results["metrics"][results["metric"]])
    assert results["parameters"]["adapter"] > 0
    assert (tmp_path / "runs" / f"{name}-smoke" / ADAPTER).is_file()
