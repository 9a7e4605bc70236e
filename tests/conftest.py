"""Fixtures shared by all tests: real data where present, and small folders of real architectures.

They import what they need themselves: the process that only hands tests out to the others starts at once.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import shutil
import traceback
from collections.abc import Callable, Iterator

# Set before torch and the hub client are imported: tiny models only lose by threads, and no test asks the hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from structlora_pyg.study.config import RunConfig

gc.disable()  # a tenth of all time went into it
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def pytest_collection_finish() -> None:
    """Let the garbage collector forget the 700,000 objects of the libraries: every look at them takes 0.7 seconds."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries complain at the end that theirs have leaked


@pytest.fixture(scope="module", autouse=True)
def collected_after_each_file() -> Iterator[None]:
    """Collect what the tests of a file have left."""
    yield
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_nothing() -> Iterator[None]:
    """Leave flushing to the operating system, no test pulls the plug; compile every template once.

    And keep no stack of every seed, which torch would set on devices that are not there yet.
    """
    import jinja2
    from torch_geometric import template

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(traceback, "format_stack", lambda *_: [])
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        for name in ("Environment", "FileSystemLoader"):
            patch.setattr(template, name, functools.cache(getattr(jinja2, name)))
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets and pretrained weights: ``$STRUCTLORA_DATA``, or ``../shared/data``."""
    named = os.environ.get("STRUCTLORA_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set STRUCTLORA_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random BERT without a head (but with a pooler) and its tokenizer."""
    from helpers.official import save_bert

    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with grouped queries and its tokenizer."""
    from helpers.official import save_llama

    return save_llama(tmp_path_factory.mktemp("llama"), num_key_value_heads=1, max_position_embeddings=128)


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of ``test_vit``, timm's own architecture for tests."""
    import timm
    import torch
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit").state_dict(), file)
    return file


@pytest.fixture(scope="session")
def rte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 22 training and 6 evaluation pairs in RTE's layout."""
    folder = tmp_path_factory.mktemp("RTE")
    labels = ["entailment", "not_entailment"]
    for split, count in (("train", 22), ("dev", 6)):
        ends = ["it is wet", "Z Z Z Z"]
        rows = [f"{i}\t{'so ' * (i % 5)}it rains {i}\t{ends[i % 2]}\t{labels[i % 2]}" for i in range(count)]
        (folder / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    return folder


@pytest.fixture(scope="session")
def piqa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 8 training and 4 evaluation questions in PIQA's layout."""
    from helpers.official import write_piqa

    return write_piqa(tmp_path_factory.mktemp("piqa"))


@pytest.fixture
def make_config(tiny_bert: Path, rte_folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that gives the configuration of a tiny run; keywords are those of `TrainConfig`."""
    from helpers.runs import tiny_config

    return lambda name="run", **changes: tiny_config(tiny_bert, rte_folder, tmp_path / name, **changes)


@pytest.fixture(scope="session")
def watched_run(tiny_bert: Path, rte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of eight steps whose graphs (every other step), attention and structure were recorded."""
    from helpers.runs import tiny_config

    from structlora_pyg.study.train import train

    folder = tmp_path_factory.mktemp("watched") / "run"
    adapter = {
        "target_modules": ["query", "key", "value"],
        "graph": {"refresh_every": 2, "threshold": 0.0},
        "coordinator": {"conv": "GATv2Conv", "conv_kwargs": {"heads": 2, "concat": False}, "hidden_channels": 8},
        "filter": {"lr_scale": 100.0},
    }
    options = {"record_every": 2, "watch_every": 2, "eval_every": 4, "save_every": 0}
    train(tiny_config(tiny_bert, rte_folder, folder, adapter=adapter, **options), progress=False)
    return folder


@pytest.fixture(scope="session")
def looked(watched_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that ``structlora look`` wrote of that run."""
    from structlora_pyg.cli import main

    folder = tmp_path_factory.mktemp("looked")
    assert main(["look", str(watched_run), "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Headless Chromium; tests that need one are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, url: str) -> Iterator:
    """Open the module's `url`; at the end no page may have had an error, or asked for anything but itself."""
    contexts, said, asked = [], [], []

    def open_page(**options):
        context = browser.new_context(**options)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) == {url}
