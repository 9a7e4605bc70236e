"""The command ``structlora`` and its subcommands; `COMMANDS` lists them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from structlora_pyg.checks import ConfigError, build
from structlora_pyg.study.cli_options import (
    AblateOptions,
    CompareOptions,
    ConvsOptions,
    DemoOptions,
    DescribeOptions,
    ExportOptions,
    InspectOptions,
    LookOptions,
    ReportOptions,
    TrainOptions,
    ValidateOptions,
)
from structlora_pyg.study.config_files import load_config, shipped_configs
from structlora_pyg.study.run_config import RunConfig

# What a user can mend. Anything else is a defect of ours and keeps its traceback.
EXPECTED = (ValueError, FileExistsError, FileNotFoundError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 wrong input, 130 interrupted."""
    namespace = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "matplotlib", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries below us; not the user's to mend
    try:
        command, kind = COMMANDS[namespace.command]
        options, overrides = _split(kind, namespace.overrides)
        return command(options, namespace.config, overrides)
    except EXPECTED as error:
        print(f"structlora {namespace.command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error) is RuntimeError:  # torch's own
            raise
        print(f"structlora {namespace.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"structlora {namespace.command}: interrupted", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return ``command``, ``config`` and ``overrides``, what was written as ``--key value`` among the latter."""
    parser = _parser()
    # argparse takes one run of positional arguments only; settings may stand between options as well.
    namespace, rest = parser.parse_known_args(arguments)
    if unknown := [item for item in rest if item.startswith("-")]:
        parser.error(f"unknown option {' '.join(unknown)}; see structlora {namespace.command} --help")
    namespace.overrides = [*namespace.own, *namespace.overrides, *rest]
    return namespace


def _demo(options: DemoOptions, config: str | None, overrides: list[str]) -> int:
    from structlora_pyg.study.demo import run_demo

    if config or overrides:
        names = ", ".join(f.name for f in dataclasses.fields(DemoOptions))
        raise ConfigError([f"demo takes no configuration, only {names}; got {' '.join([config or '', *overrides])}"])
    run_demo(**dataclasses.asdict(options))
    return 0


def _train(options: TrainOptions, config: str | None, overrides: list[str]) -> int:
    from structlora_pyg.study.train import train

    train(_required(config, overrides), resume=options.resume)
    return 0


def _validate(options: ValidateOptions, config: str | None, overrides: list[str]) -> int:
    from structlora_pyg.study.run_checks import check_run

    check_run(_required(config, overrides))
    print(f"{config or 'the configuration'} is valid")
    return 0


def _describe(options: DescribeOptions, config: str | None, overrides: list[str]) -> int:
    from structlora_pyg.analysis.describe import describe

    model = _build_model(_required(config, overrides))
    print(describe(model))
    if options.graph:
        from structlora_pyg.analysis.graph_plots import draw_graph

        _draw(draw_graph(model.adapter_graph()), options.graph)
    return 0


def _draw(figure: Any, file: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    print(f"drawn: {file}")


def _inspect(options: InspectOptions, config: str | None, overrides: list[str]) -> int:
    from structlora_pyg.analysis.graph_plots import draw_graph
    from structlora_pyg.analysis.inspect import inspect_adapter
    from structlora_pyg.analysis.plots import similarity_heatmaps

    if config or overrides:
        raise ConfigError(
            [f"inspect takes one folder, graph, similarity and html; got {' '.join([config or '', *overrides])}"]
        )
    found = inspect_adapter(options.adapter)
    print(found.summary())
    if options.graph:
        _draw(draw_graph(found.graph), options.graph)
    if options.similarity:
        _draw(similarity_heatmaps({"updates": found.structure.similarity}, found.structure.names), options.similarity)
    if options.html:
        from structlora_pyg.study.report.inspection_page import write_inspection

        title = f"LoRA adapter {Path(options.adapter).resolve().name}"
        print(f"written: {write_inspection(options.html, found, title)}")
    return 0


def _look(options: LookOptions, config: str | None, overrides: list[str]) -> int:
    from structlora_pyg.study.report.look_page import look

    if config or overrides:
        raise ConfigError([f"look takes one folder and output_dir; got {' '.join([config or '', *overrides])}"])
    for path in look(options.run, options.output_dir).values():
        print(path)
    return 0


def _export(options: ExportOptions, config: str | None, overrides: list[str]) -> int:
    checkpoint, output = Path(options.checkpoint), Path(options.output)
    if config is None:
        file = checkpoint.parent / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; give the run's configuration with --config")
        try:
            run, problems = build(RunConfig, json.loads(file.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error}); give the run's configuration with --config") from error
        if not problems and not options.trust_remote_code:
            known = "if you know it, say trust_remote_code=true"
            problems = [f"{named} is code; {known}" for named in run.adapter.foreign_code()]
        if problems:
            raise ConfigError([f"{file}: {p}" for p in problems])
    else:
        run = _required(config, overrides)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another output")
    from structlora_pyg.study.train import restore
    from structlora_pyg.tuner.export import save_base
    from structlora_pyg.tuner.model import StructLoraModel

    task, method = restore(run, checkpoint)
    adapted = method.model
    if options.ragged and not isinstance(adapted, StructLoraModel):
        raise ConfigError([f"ragged has no effect with method.name={run.method.name}, which closes no gates"])
    if options.merge:
        save_base(method.merge(), output)
    else:
        print(json.dumps(adapted.export(output, ragged=True) if options.ragged else method.export(output)))
    task.save_extras(output)
    print(f"written to {output}")
    return 0


def _convs(options: ConvsOptions, config: str | None, overrides: list[str]) -> int:
    from structlora_pyg.analysis.conv_reports import conv_reports

    if config or overrides:
        raise ConfigError([f"convs takes no configuration, only json; got {' '.join([config or '', *overrides])}"])
    reports = conv_reports()
    if options.json:
        print(json.dumps([dataclasses.asdict(r) for r in reports], indent=2))
        return 0
    width = max(len(r.name) for r in reports)
    for r in reports:
        used = ", ".join(r.edge_information) or "no edge information"
        print(f"{r.name:<{width}}  {r.hetero:<11}  {'works   ' + used if r.works else 'refused ' + r.reason}")
    hetero = sum(bool(r.hetero) for r in reports)
    print(f"{sum(r.works for r in reports)} of {len(reports)} work by name alone, {hetero} under coordinator.hetero")
    return 0


def _compare(options: CompareOptions, config: str | None, overrides: list[str]) -> int:
    if options.list:
        if config or overrides:
            raise ConfigError([f"list takes no configuration, only json; got {' '.join([config or '', *overrides])}"])
        _list_methods(options.json)
        return 0
    if config is None:
        raise ConfigError(["no grid given; --config takes a YAML file, for instance benchmarks/configs/ranks.yaml"])
    from structlora_pyg.study.grid import load_grid
    from structlora_pyg.study.sweep import failed_cells, run_grid

    grid = load_grid(config, overrides, options.size)
    table = run_grid(grid, options.output_dir, options.jobs)
    tried = [cell for cell in table["cells"] if "unavailable" not in grid.tasks[cell["task"]]]
    failed = failed_cells(table)
    print(f"{len(tried)} runs in {options.output_dir}, {len(failed)} of them failed")
    print(f"tables: structlora report {options.output_dir}")
    return 1 if failed else 0


def _ablate(options: AblateOptions, config: str | None, overrides: list[str]) -> int:
    from structlora_pyg.study.ablate import ablation, own_name
    from structlora_pyg.study.report.comparison_report import write_comparison
    from structlora_pyg.study.sweep import failed_cells, run_grid

    if config is None:
        shipped = ", ".join(shipped_configs())
        raise ConfigError([f"no configuration given; --config takes a YAML file or one of {shipped}"])
    chosen = (options.seeds, options.list_mode, options.controls, options.learning_rates)
    grid = ablation(config, overrides, *chosen)
    width = max(map(len, grid.methods))
    for row, change in grid.methods.items():
        print(f"{row:<{width}}  {', '.join(f'{key}={value}' for key, value in change.items())}".rstrip())
    tuned = ", besides those that choose learning rates" if len(options.learning_rates) > 1 else ""
    print(f"{len(grid.methods)} rows, {len(grid.cells())} runs{tuned}")
    if options.dry_run:
        return 0
    grid.name = own_name(grid, options.output_dir)
    table = run_grid(grid, options.output_dir, options.jobs)
    for path in write_comparison([options.output_dir], options.output_dir).values():
        print(path)
    return 1 if failed_cells(table) else 0


def _list_methods(as_json: bool) -> None:
    from structlora_pyg.study.methods import METHODS
    from structlora_pyg.study.tasks.registry import TASKS

    lists: dict[str, dict[Any, str]] = {"methods": {name: m.summary for name, m in METHODS.items()}, "tasks": TASKS}
    if as_json:
        print(json.dumps(lists, indent=2))
        return
    width = max(len(name) for entries in lists.values() for name in entries)
    for key, entries in zip(("method.name", "data.task"), lists.values(), strict=True):
        print(f"{key}=")
        for name, summary in entries.items():
            print(f"  {name:<{width}}  {summary}")


def _report(options: ReportOptions, config: str | None, overrides: list[str]) -> int:
    from structlora_pyg.study.report.comparison_report import write_comparison

    if config or overrides:
        raise ConfigError([f"report takes folders and output_dir; got {' '.join([config or '', *overrides])}"])
    for path in write_comparison(options.folders, options.output_dir or options.folders[0]).values():
        print(path)
    return 0


def _build_model(run: RunConfig) -> Any:
    """Return the coordinated model, from a few examples only."""
    from structlora_pyg.study.methods import METHODS
    from structlora_pyg.study.tasks.registry import load_task
    from structlora_pyg.study.train import with_head
    from structlora_pyg.tuner.model import get_structlora_model

    if not METHODS[run.method.name].is_structlora:
        raise ConfigError([f"method.name={run.method.name} has no graph to describe; set method.name=structlora"])
    few = dataclasses.replace(run.data, train_limit=2, eval_limit=2)
    task = load_task(run.model, few, run.train.seed)
    adapter = with_head(run.adapter, task.head)
    adapter.use_dora = adapter.use_dora or METHODS[run.method.name].dora
    if adapter.init_lora_weights == "gradient":  # the start itself is not needed here
        adapter.init_lora_weights = True
    return get_structlora_model(task.model, adapter)


def _required(config: str | None, overrides: list[str]) -> RunConfig:
    if config is None and not overrides:
        raise ConfigError(
            [f"no configuration given; --config takes a YAML file or one of {', '.join(shipped_configs())}"]
        )
    return load_config(config, overrides)


def _split(kind: type, items: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the command's own options and the remaining overrides."""
    import yaml

    names = {f.name for f in dataclasses.fields(kind)}
    own = [item for item in items if item.partition("=")[0] in names and "=" in item]
    try:
        values = {key: yaml.safe_load(text) for key, _, text in (item.partition("=") for item in own)}
    except yaml.YAMLError as error:
        raise ConfigError([f"{' '.join(own)}: a value is not valid YAML; quote it"]) from error
    rest = [item for item in items if item not in own]
    bare = [item for item in rest if "=" not in item]
    if kind is InspectOptions and bare:
        values["adapter"] = bare[0]
        rest.remove(bare[0])
    if kind is LookOptions and bare:
        values["run"] = bare[0]
        rest.remove(bare[0])
    if kind is ReportOptions and bare:
        values["folders"] = bare
        rest = [item for item in rest if item not in bare]
    options, problems = build(kind, values)
    if problems:
        raise ConfigError(problems)
    return options, rest


Command = Callable[[Any, "str | None", list[str]], int]
COMMANDS: dict[str, tuple[Command, type]] = {
    "demo": (_demo, DemoOptions),
    "train": (_train, TrainOptions),
    "validate": (_validate, ValidateOptions),
    "describe": (_describe, DescribeOptions),
    "export": (_export, ExportOptions),
    "look": (_look, LookOptions),
    "inspect": (_inspect, InspectOptions),
    "convs": (_convs, ConvsOptions),
    "compare": (_compare, CompareOptions),
    "ablate": (_ablate, AblateOptions),
    "report": (_report, ReportOptions),
}
WITHOUT_CONFIG = ("demo", "look", "inspect", "convs", "report")
GAT = "rte adapter.coordinator.conv=GATv2Conv"
EXAMPLE = {
    "compare": "benchmarks/configs/glue.yaml --size mini --jobs 2",
    "ablate": "rte adapter.coordinator.conv=GCNConv,GATv2Conv adapter.coordinator.num_layers=1,2 --controls --seeds 3\n"
    "\nA key with several values, key=a,b, makes rows; one with one value, key=a, is set for all rows. Commas inside\n"
    "brackets, braces and quotes belong to a value: key=[a,b] is one list, key=[a,b],[c] are two. Several values of\n"
    "adapter.r and data.train_fraction become columns. Every difference is from the configuration as it stands.",
}
HELP = {
    "demo": "adapt a small vision transformer to new digits, with plain LoRA and with StructLoRA, and compare",
    "train": "fine-tune a model on a data set and export a plain LoRA",
    "validate": "report every problem of a configuration, without loading anything",
    "describe": "print the resolved pipeline: adapters, graph, stages, parameters; draw the graph",
    "look": "draw what the adapters did over training: graph, gates, structure, attention, on one page",
    "inspect": "report structure and redundancy of any LoRA folder of PEFT, without its base model",
    "convs": "list the convolutions of PyTorch Geometric and what each can do as a coordinator",
    "compare": "run a grid of methods, tasks, ranks, data fractions and seeds; goes on where it stopped",
    "ablate": "compare a configuration with changes to it, key.sub=a,b, and with controls, and write the report",
    "report": "write tables and figures of comparisons: one HTML page, Markdown, LaTeX",
    "export": "turn a checkpoint of train into a plain adapter folder or a merged model",
}


class _Own(argparse.Action):
    """Collects ``--name value`` and ``--name`` as ``name=value`` and ``name=true``."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Add one."""
        text = values[0] if values else "true"
        namespace.own = [*namespace.own, f"{self.dest_name(option)}={text}"]

    @staticmethod
    def dest_name(option: str | None) -> str:
        """Return the key that an option string stands for."""
        return (option or "").lstrip("-").replace("-", "_")


def _parser() -> argparse.ArgumentParser:
    from structlora_pyg import __version__

    parser = argparse.ArgumentParser(
        prog="structlora", description="LoRA fine-tuning in which adapters are the nodes of a PyTorch Geometric graph."
    )
    parser.add_argument("--version", action="version", version=f"structlora_pyg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, kind) in COMMANDS.items():
        lines = (kind.__doc__ or "").partition("Args:")[2].rstrip()
        of_a_run = name not in (*WITHOUT_CONFIG, "compare")
        sub = commands.add_parser(
            name,
            help=HELP[name],
            description=HELP[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=(f"own keys, as key=value or --key value:{lines}\n\n" if lines else "")
            + (f"shipped configurations: {', '.join(shipped_configs())}\n" if of_a_run else "")
            + ("" if name in WITHOUT_CONFIG else f"example: structlora {name} --config {EXAMPLE.get(name, GAT)}"),
        )
        for option in dataclasses.fields(kind):  # --jobs 2 is another way to write jobs=2
            nargs = 0 if option.type == "bool" else 1
            forms = dict.fromkeys((f"--{option.name}", f"--{option.name.replace('_', '-')}"))
            sub.add_argument(*forms, dest="own", action=_Own, nargs=nargs, help=argparse.SUPPRESS)
        sub.set_defaults(own=[])
        what = "YAML file, or the name of a shipped configuration" if of_a_run else "YAML file of a grid"
        sub.add_argument("--config", metavar="FILE", help=argparse.SUPPRESS if name in WITHOUT_CONFIG else what)
        sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings; values are read as YAML")
    return parser
