"""The subcommands of ``structlora``: each function runs one, and its docstring is its help. It may return an exit code.

A function imports what it needs when it runs, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structlora_pyg import __version__
from structlora_pyg.checks import ConfigError, short
from structlora_pyg.study import CONFIGS

if TYPE_CHECKING:
    from structlora_pyg.study.config import RunConfig

DEMO = CONFIGS / "grids" / "demo.yaml"


def demo(options: Namespace) -> int:
    """Adapt a small vision transformer to new digits, with plain LoRA and with StructLoRA, and compare."""
    from structlora_pyg.study.grid import load_grid

    grid = load_grid(DEMO, size="quick" if options.quick else None)
    grid.seeds = options.seeds or grid.seeds
    grid.settings["model.path"] = str(Path(options.output_dir) / "bases")
    return _sweep(grid, options)


def train(options: Namespace) -> int:
    """Fine-tune a model on a data set and export a plain LoRA."""
    from structlora_pyg.study.run import run_problems
    from structlora_pyg.study.train import DIVERGES, estimate, smoke, train

    run = _run_config(options, run_problems)
    if options.dry_run:
        print(estimate(run))
        return 0
    found = train(smoke(run) if options.smoke else run, resume=options.resume)
    return 1 if any(alarm.endswith(DIVERGES) for alarm in found.get("alarms", [])) else 0


def fetch(options: Namespace) -> None:
    """Get the model and the data of a configuration from the hub into its cache, to run without a network."""
    from structlora_pyg.study.tasks import load_task

    run = _run_config(options)
    task = load_task(run.model, run.data, run.train.seed)
    counts = f"{len(task.train_set):,} examples for training, {len(task.eval_set):,} for evaluation"
    print(f"{counts}, and the model are here")


def validate(options: Namespace) -> None:
    """Report every problem of a configuration, without loading anything."""
    from structlora_pyg.study.run import run_problems

    _run_config(options, run_problems)
    print(f"{options.config or 'the configuration'} is valid")


def describe(options: Namespace) -> None:
    """Print the resolved pipeline: adapters, graph, stages, parameters; draw the graph."""
    from structlora_pyg.analysis.inspect import describe
    from structlora_pyg.study.methods import METHODS
    from structlora_pyg.study.run import with_head
    from structlora_pyg.study.tasks import TASKS, load_task
    from structlora_pyg.tuner.model import get_structlora_model

    run = _run_config(options)
    method = METHODS.get(run.method.name)
    if method is None or not method.is_structlora:
        raise ConfigError(f"method.name={run.method.name} has no graph to describe; set method.name=structlora")
    kind = TASKS.get(run.data.task)
    few = run.data if kind and kind.brings_data else dataclasses.replace(run.data, train_limit=2, eval_limit=2)
    task = load_task(run.model, few, run.train.seed)
    adapter = with_head(run.adapter, task.head)
    adapter.use_dora = adapter.use_dora or method.dora
    if adapter.init_lora_weights == "gradient":  # the start itself is not needed here
        adapter.init_lora_weights = True
    model = get_structlora_model(task.model, adapter)
    print(describe(model))
    if options.graph:
        _draw_graph(model.adapter_graph(), options.graph)


def export(options: Namespace) -> None:
    """Turn a checkpoint of train into a plain adapter folder or a merged model, on the hub too."""
    import huggingface_hub

    from structlora_pyg.study.run import restore
    from structlora_pyg.tuner.export import save_base
    from structlora_pyg.tuner.model import StructLoraModel

    output = Path(options.output)
    run = _run_config(options) if options.config else _run_of(options.checkpoint, options.trust_remote_code)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another --output")
    address = _make_repo(options.hub) if options.hub else ""
    restored = restore(run, Path(options.checkpoint))
    method, adapted = restored.method, restored.model
    if options.ragged and not isinstance(adapted, StructLoraModel):
        raise ConfigError(f"--ragged has no effect with method.name={run.method.name}, which closes no gates")
    if options.merge:
        save_base(method.merge(), output)
    else:
        print(json.dumps(adapted.export(output, ragged=True) if options.ragged else method.export(output)))
    restored.task.save_extras(output)
    print(f"written to {output}")
    if options.hub:
        huggingface_hub.HfApi().upload_folder(repo_id=options.hub, folder_path=output)
        print(f"uploaded to {address}")


def _make_repo(repo: str) -> str:
    """Make a repository for a model on the hub, unless it is there, and return its address."""
    import huggingface_hub

    from structlora_pyg.study.tasks.splits import quickly_offline

    try:
        with quickly_offline():
            return str(huggingface_hub.HfApi().create_repo(repo, exist_ok=True))
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
        raise OSError(f"--hub={repo} cannot be written to ({short(error)}); log in with: hf auth login") from error


def look(options: Namespace) -> None:
    """Draw what the adapters did over training: graph, gates, structure, attention, on one page."""
    from structlora_pyg.study.report.look import look

    _print_files(look(options.run_folder, options.output_dir))


def inspect(options: Namespace) -> None:
    """Report structure and redundancy of any LoRA folder of PEFT, without its base model."""
    from structlora_pyg.analysis.inspect import inspect_adapter

    found = inspect_adapter(options.adapter)
    print(found.summary())
    if options.graph:
        _draw_graph(found.graph, options.graph)
    if options.similarity:
        from structlora_pyg.analysis.plots import similarity_heatmaps

        _save(similarity_heatmaps({"updates": found.structure.similarity}, found.structure.names), options.similarity)


def convs(options: Namespace) -> None:
    """List the convolutions of PyTorch Geometric and what each can do as a coordinator."""
    from structlora_pyg.analysis.inspect import conv_reports

    reports = conv_reports()
    width = max(len(r.name) for r in reports)
    for r in reports:
        used = ", ".join(r.edge_information) or "no edge information"
        print(f"{r.name:<{width}}  {r.hetero:<11}  {'works   ' + used if r.works else 'refused ' + r.reason}")
    hetero = sum(bool(r.hetero) for r in reports)
    print(f"{sum(r.works for r in reports)} of {len(reports)} work by name alone, {hetero} under coordinator.hetero")


def compare(options: Namespace) -> int:
    """Run a grid of methods, tasks, ranks, data fractions and seeds, and write the report; go on where it stopped."""
    if options.list:
        from structlora_pyg.study.methods import METHODS
        from structlora_pyg.study.tasks import TASKS

        registries: dict[str, Any] = {"method.name": METHODS, "data.task": TASKS}
        for key, kinds in registries.items():
            lines = [f"  {name:<16}  {kind.summary}" for name, kind in kinds.items()]
            print(f"{key}=", *lines, sep="\n")
        return 0
    if options.config is None:
        raise ConfigError("no grid given; --config takes a YAML file, for instance benchmarks/configs/ranks.yaml")
    from structlora_pyg.study.grid import load_grid

    return _sweep(load_grid(options.config, options.settings, options.size), options)


def ablate(options: Namespace) -> int:
    """Compare a configuration with changes to it, key.sub=a,b, and with controls, and write the report.

    A key with several values, key=a,b, makes rows; one with one value, key=a, is set for all rows. Commas inside
    brackets, braces and quotes belong to a value: key=[a,b] is one list, key=[a,b],[c] are two. Several values of
    adapter.r and data.train_fraction become columns. Every difference is from the configuration as it stands.
    """
    from structlora_pyg.study.ablate import ablation

    chosen = (options.seeds, options.list_mode, options.controls, options.learning_rates)
    grid = ablation(options.config, options.settings, *chosen)
    width = max(map(len, grid.methods))
    for row, change in grid.methods.items():
        print(f"{row:<{width}}  {', '.join(f'{key}={value}' for key, value in change.items())}".rstrip())
    tuned = ", besides those that choose learning rates" if len(options.learning_rates) > 1 else ""
    print(f"{len(grid.methods)} rows, {len(grid.cells())} runs{tuned}")
    if options.dry_run:
        return 0
    return _sweep(grid, options)


def report(options: Namespace) -> None:
    """Write tables and figures of comparisons: one HTML page, LaTeX, CSV."""
    if options.pack:
        from structlora_pyg.study.report.records import pack

        return _print_files(pack(options.folders, options.pack))
    from structlora_pyg.study.report.report import write_comparison

    _print_files(write_comparison(options.folders, options.output_dir or options.folders[0]))


def doctor(options: Namespace) -> None:
    """Print versions, devices, extras and the data folder, and what is missing."""
    import os
    import platform
    import shutil
    from importlib import metadata

    import torch
    from packaging.requirements import Requirement

    from structlora_pyg.study.train import installed

    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    print(f"structlora_pyg {__version__}, Python {platform.python_version()} on {system}")
    for package in ("torch", "torch-geometric", "peft", "transformers"):
        print(f"{package:<18}{installed(package) or 'not installed'}")
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    print(f"{'GPUs':<18}{', '.join(names) or 'none; runs are on the processor'}")
    needs = [Requirement(text) for text in metadata.requires("structlora-pyg") or ()]
    for extra in metadata.metadata("structlora-pyg").get_all("Provides-Extra") or ():
        wanted = [r.name for r in needs if r.marker and not r.marker.evaluate() and r.marker.evaluate({"extra": extra})]
        missing = [package for package in wanted if installed(package) is None]
        fix = f"without {', '.join(missing)}; pip install 'structlora-pyg[{extra}]'"
        print(f"{f'extra {extra}':<18}{fix if missing else 'complete'}")
    java = "there" if shutil.which("java") else "none; CIDEr of data.task=captions needs one"
    data = os.environ.get("STRUCTLORA_DATA")
    place = "not set; data and models are looked up in the working directory, then on the hub"
    print(f"{'java':<18}{java}")
    print(f"{'STRUCTLORA_DATA':<18}{place if not data else data if Path(data).is_dir() else f'{data} does not exist'}")


def _sweep(grid: Any, options: Namespace) -> int:
    """Run what is missing of a grid, print its tables and write the report of its folder; return the exit code."""
    from structlora_pyg.study.report.page import table_text
    from structlora_pyg.study.report.records import read_comparison
    from structlora_pyg.study.report.report import write_comparison
    from structlora_pyg.study.report.summary import summarize
    from structlora_pyg.study.report.tables import difference_table, score_table
    from structlora_pyg.study.sweep import failed_cells, run_grid

    folder = options.output_dir
    table = run_grid(grid, folder, options.jobs, options.backend, options.backend_options)
    summary = summarize(next(found for found in read_comparison(folder) if found.name == grid.name))
    for part in filter(None, (score_table(summary), difference_table(summary))):
        print(f"{table_text(part)}\n")
    tried = [cell for cell in table["cells"] if "unavailable" not in grid.tasks[cell["task"]]]
    failed = failed_cells(table)
    print(f"{len(tried)} runs in {folder}, {len(failed)} of them failed")
    print(f"report: {write_comparison([folder], folder)['report.html']}")
    return 1 if failed else 0


def _print_files(files: dict[str, Path]) -> None:
    for path in files.values():
        print(path)


def _draw_graph(graph: Any, file: str) -> None:
    from structlora_pyg.analysis.graph_plot import draw_graph

    _save(draw_graph(graph), file)


def _save(figure: Any, file: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    print(f"drawn: {file}")


def _run_config(options: Namespace, *checks: Callable[[RunConfig], list[str]]) -> RunConfig:
    from structlora_pyg.study.config import load_config

    return load_config(options.config, options.settings, *checks)


def _run_of(checkpoint: str, trust_remote_code: bool) -> RunConfig:
    """Return the configuration that a run keeps beside its checkpoints."""
    from structlora_pyg.study.run_folder import stored_config

    folder = Path(checkpoint).absolute()
    if not folder.name.startswith("checkpoint-") or not folder.is_dir():
        raise FileNotFoundError(f"{checkpoint} is no checkpoint; give a folder checkpoint-<step> of a run of train")
    run = stored_config(folder.parent)
    if not trust_remote_code and (found := run.adapter.foreign_code()):
        raise ConfigError([f"{named} is code; if you know it, say --trust-remote-code" for named in found])
    return run
