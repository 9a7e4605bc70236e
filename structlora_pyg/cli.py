"""The command ``structlora``; `structlora_pyg.study.commands` holds its subcommands.

Settings of a configuration are written ``key.sub=value``, options of a subcommand ``--option value``.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import shlex
import sys
import warnings
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

from structlora_pyg import __version__
from structlora_pyg.checks import bounds, check_writable, nearest, read
from structlora_pyg.study import commands, shipped_configs

# What a user can mend. Anything else is a defect of ours and keeps its traceback.
EXPECTED = (ValueError, OSError, FloatingPointError)
GOES_ON = {  # what an interrupted command is told, and what is added to it
    **dict.fromkeys(("demo", "compare", "ablate"), ("go on with", "")),
    "train": ("go on from the last checkpoint, if train.save_every has made one, with", " --resume"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind ``structlora``; default: that of the process.

    Returns:
        The exit code: 0 done, 1 some runs failed, 2 wrong input or a missing package, 130 interrupted.
    """
    try:
        options = parse(arguments)
    except SystemExit as stop:  # after --help and --version, and where argparse has named what is wrong
        return int(stop.code or 0)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "matplotlib", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries below us; not the user's to mend
    try:
        for name in ("output_dir", "output", "pack", "graph", "similarity"):
            if path := getattr(options, name, None):
                folder = Path(path).parent if name in ("graph", "similarity") else path
                check_writable(folder, f"--{name.replace('_', '-')}")
        return options.run(options) or 0
    except EXPECTED as error:
        return _stop(options, str(error), 2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "structlora_pyg"):
            raise
        return _stop(options, f"{package} is not installed: pip install 'structlora-pyg[study]'", 2)
    except RuntimeError as error:
        if type(error) is RuntimeError:  # torch's own
            raise
        return _stop(options, str(error), 2)
    except KeyboardInterrupt:
        said, more = GOES_ON.get(options.command, ("start again with", ""))
        words = shlex.join([word for word in arguments or sys.argv[1:] if word != more.strip()])
        return _stop(options, f"interrupted; {said}: structlora {words}{more}", 130)


def _stop(options: Namespace, message: str, code: int) -> int:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    print(f"{red}structlora {options.command}:{plain} {message}", file=sys.stderr)
    return code


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """Return the options of a subcommand; ``run`` is its function, ``settings`` what was written ``key.sub=value``."""
    parser = _parser()
    # argparse takes one run of positional arguments only; settings may stand between options as well.
    options, rest = parser.parse_known_args(arguments)
    wrong = [item for item in rest if item.startswith("-") or "settings" not in options]
    given = getattr(options, "settings", [])
    if given and "config" in options and options.config is None and re.fullmatch(r"[^=-][^=]*", given[0]):
        options.config = given.pop(0)  # structlora train rte
    for item in getattr(options, "settings", []):
        name = item.partition("=")[0]
        if hasattr(options, name):
            parser.error(f"{name} is an option of {options.command}: write --{name.replace('_', '-')}, not {item}")
    if wrong:
        name = wrong[0].partition("=")[0]
        known = [f"--{key.replace('_', '-')}" for key in vars(options) if key not in ("run", "settings")]
        hint = "".join(f" Did you mean {key}?" for key in difflib.get_close_matches(name, known, 1, 0.7))
        if not hint and "settings" in options:
            hint = f" Settings have no dashes: train.{name.lstrip('-')}=VALUE, or another section than train."
        parser.error(f"unknown option {' '.join(wrong)}; see structlora {options.command} --help.{hint}")
    known_run = "config" in options and (options.config or (options.command != "ablate" and (given or rest)))
    if options.command in ("train", "validate", "describe", "ablate") and not known_run:
        parser.error(f"no configuration given; --config takes a YAML file or one of {', '.join(shipped_configs())}")
    if rest:
        options.settings = [*options.settings, *rest]
    return options


class _Parser(argparse.ArgumentParser):
    """A parser that names the nearest of what could have been meant.

    Attributes:
        commands: The parsers of the commands by name.
    """

    commands: Mapping[str, argparse.ArgumentParser]

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with 2."""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += "." + nearest(choice[1], re.findall(r"[\w-]+", choice[2]))
        super().error(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="structlora", description="LoRA fine-tuning in which adapters are the nodes of a PyTorch Geometric graph."
    )
    parser.add_argument("--version", action="version", version=f"structlora_pyg {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    parser.commands = subparsers.choices

    def add(run: Callable[[Namespace], int | None], config: str = "", example: str = "") -> argparse.ArgumentParser:
        text = "\n".join(line.strip() for line in (run.__doc__ or "").splitlines())
        sub = subparsers.add_parser(
            run.__name__,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example: structlora {run.__name__} {example}" if example else None,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        if config:
            sub.add_argument("--config", metavar="FILE", help=config)
            text = "settings in place of those in it; the first word may be the file or name itself"
            sub.add_argument("settings", nargs="*", metavar="key.sub=value", help=text)
        return sub

    def add_sweep(sub: argparse.ArgumentParser, folder: str) -> None:
        text = "folder of results; other sweeps and processes, on any machines, may share it, and then share runs"
        sub.add_argument("--output-dir", default=folder, metavar="FOLDER", help=f"{text} (default: {folder})")
        sub.add_argument("--jobs", type=_at_least(1), metavar="N", help="runs side by side; default: 1, or a cluster's")
        sub.add_argument("--backend", default="loky", help="loky (this machine, the default), ray, dask or slurm")
        text = 'for a cluster, such as "{slurm_partition: gpu}"'
        sub.add_argument(
            "--backend-options",
            type=_read(dict, 'a YAML mapping such as "{num_gpus: 1}"'),
            default={},
            metavar="YAML",
            help=text,
        )

    a_run = f"YAML file, or a shipped configuration: {', '.join(shipped_configs())}"
    drawing = "file to draw {} to (.svg, .png or .pdf)"
    gat = "--config rte adapter.coordinator.conv=GATv2Conv"

    sub = add(commands.demo)
    sub.add_argument("--output-dir", default="runs/demo", metavar="FOLDER", help="folder for results and report")
    sub.add_argument("--seeds", type=_at_least(2), metavar="N", help="paired seeds, >= 2 (default: 5; with --quick 2)")
    sub.add_argument("--quick", action="store_true", help="two seeds and few steps, to see that everything works")
    sub.set_defaults(jobs=min(os.cpu_count() or 1, 8), backend="loky", backend_options={})

    sub = add(commands.train, a_run, gat)
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--resume", action="store_true", help="continue the run in train.output_dir")
    text = "three steps on a few examples, into a folder of their own: does everything work?"
    form.add_argument("--smoke", action="store_true", help=text)
    text = "estimate time and memory from the first steps, and write nothing"
    form.add_argument("--dry-run", action="store_true", help=text)
    add(commands.fetch, a_run, "rte")
    add(commands.validate, a_run, gat)
    sub = add(commands.describe, a_run, gat)
    sub.add_argument("--graph", type=_drawing, metavar="FILE", help=drawing.format("the adapter graph"))

    sub = add(commands.export, "YAML file of the run; default: what the run keeps beside its checkpoints")
    sub.add_argument("--checkpoint", required=True, metavar="FOLDER", help="a checkpoint of train")
    sub.add_argument("--output", required=True, metavar="FOLDER", help="folder to write to")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--merge", action="store_true", help="write the base model with merged weights")
    form.add_argument("--ragged", action="store_true", help="write each layer at the rank its open gates leave")
    text = "upload it too, to a repository of the hub, which is made unless it is there"
    sub.add_argument("--hub", metavar="USER/NAME", help=text)
    text = "import what the run's configuration names by dotted path, such as your own convolution"
    sub.add_argument("--trust-remote-code", action="store_true", help=text)

    sub = add(commands.look)
    sub.add_argument("run_folder", metavar="folder", help="folder of a finished or running train")
    sub.add_argument("--output-dir", metavar="FOLDER", help="folder for look.html and figures; default: the run's")
    sub = add(commands.inspect)
    sub.add_argument("adapter", help="a LoRA folder of PEFT")
    sub.add_argument("--graph", type=_drawing, metavar="FILE", help=drawing.format("the adapter graph"))
    text = drawing.format("the similarities of the layers")
    sub.add_argument("--similarity", type=_drawing, metavar="FILE", help=text)
    add(commands.convs)

    sub = add(commands.compare, "YAML file of a grid", "--config benchmarks/configs/glue.yaml --size mini --jobs 2")
    sub.add_argument("--size", help="one of the sizes that the grid comes in, for instance mini")
    add_sweep(sub, "runs/compare")
    sub.add_argument("--list", action="store_true", help="name every method and task in a line, and run nothing")

    conv = "--config rte adapter.coordinator.conv=GCNConv,GATv2Conv"
    sub = add(commands.ablate, a_run, f"{conv} adapter.coordinator.num_layers=1,2 --controls --seeds 3")
    sub.add_argument("--seeds", type=_at_least(1), default=5, metavar="N", help="runs per row (default: 5)")
    text = "product: a row for every combination (the default); list: one key changed at a time"
    sub.add_argument("--list-mode", choices=("product", "list"), default="product", help=text)
    text = "add LoRA, no filter, no coordinator, no or random edges, shuffled nodes, frozen and MLP coordinator"
    sub.add_argument("--controls", action="store_true", help=text)
    text = "what every row chooses from on a part cut from train, such as 1e-3,3e-3; default: train.lr"
    sub.add_argument("--learning-rates", type=_rates, default=[], metavar="LR,LR", help=text)
    add_sweep(sub, "runs/ablate")
    sub.add_argument("--dry-run", action="store_true", help="name the rows and what they change, and run nothing")

    add(commands.doctor)
    sub = add(commands.report)
    sub.add_argument("folders", nargs="+", metavar="folder", help="folder of results of compare or ablate")
    sub.add_argument("--output-dir", metavar="FOLDER", help="folder for the report; default: the first one")
    sub.add_argument("--pack", metavar="FOLDER", help="write all runs there as a few small files instead, to keep")
    add(completion)
    return parser


def completion(options: Namespace) -> None:
    """Print what makes bash, or zsh after bashcompinit, complete commands: eval "$(structlora completion)"."""
    commands_of, cases = _parser().commands, []
    for name, sub in commands_of.items():
        words = sorted(set(re.findall(r"--[a-z][a-z-]+", sub.format_usage())))
        words += shipped_configs() if "--config" in words and name != "compare" else []
        cases.append(f"    {name}) words='{' '.join(words)}' ;;")
    print(
        "_structlora() {", "  local words", '  case "${COMP_WORDS[1]}" in', *cases,
        "  esac", f"  [ \"$COMP_CWORD\" -gt 1 ] || words='{' '.join(commands_of)}'",
        '  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))', "}",
        "complete -o default -F _structlora structlora", sep="\n",
    )  # fmt: skip


def _read(hint: Any, expected: str) -> Callable[[str], Any]:
    """Return what reads the value of an option as YAML, as one of a configuration is read."""

    def convert(text: str) -> Any:
        import yaml

        try:
            value, found = read(yaml.safe_load(text), hint, "it")
        except yaml.YAMLError:
            found = [text]
        if found:
            raise ArgumentTypeError(f"must be {expected}, got {text}")
        return value

    return convert


def _at_least(low: int) -> Callable[[str], Any]:
    return _read(Annotated[int, bounds(low)], f"a whole number >= {low}")


def _rates(text: str) -> list[float]:
    return _read(list[float], "numbers with commas between them such as 1e-3,3e-3")(f"[{text.strip('[]')}]")


def _drawing(text: str) -> str:
    if Path(text).suffix not in (".svg", ".png", ".pdf"):
        raise ArgumentTypeError(f"{text!r} must end in .svg, .png or .pdf")
    return text
