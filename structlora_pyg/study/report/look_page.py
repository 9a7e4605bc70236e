"""``structlora look``: one page, and its figures as files, of what a run did over training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from structlora_pyg.analysis.graph_layout import undirected
from structlora_pyg.analysis.graph_plots import draw_graphs
from structlora_pyg.analysis.look import (
    attention_heatmaps,
    dirichlet_curves,
    gates_over_training,
    likeness_over_training,
    loss_curves,
    message_share,
    recorded_attention,
    spread,
    structure_curves,
)
from structlora_pyg.analysis.plots import similarity_heatmaps
from structlora_pyg.checks import build
from structlora_pyg.data.dataset import AdapterGraphDataset
from structlora_pyg.files import replace_file, short
from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.report.look_slider import GraphSlider
from structlora_pyg.study.report.page import Details, FigureSection, Part, Text, figure_file, page
from structlora_pyg.study.run_config import RunConfig
from structlora_pyg.study.run_folder import CONFIG_FILE, GRAPHS_FOLDER, METRICS_FILE, RESULTS_FILE, Log
from structlora_pyg.study.schema import Line, Results, misfit


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What a run of ``structlora train``, finished or not, has left so far.

    Attributes:
        folder: Its folder.
        config: Its configuration, nested.
        lines: The lines of ``metrics.jsonl``.
        results: ``results.json``; None while it is running.
        graphs: The recorded adapter graphs; None if there are none.
    """

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    results: dict[str, Any] | None
    graphs: AdapterGraphDataset | None


def read_run(folder: str | Path) -> TrainedRun:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: If there is no folder, or no run in it.
        ValueError: If it holds a LoRA instead of a run, or a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the train.output_dir of a run of structlora train")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is an adapter, not a run; look at it with: structlora inspect {folder}")
    config = _read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if not {"method", "train", "adapter"} <= config.keys():
        raise FileNotFoundError(
            f"{folder} holds no run of structlora train ({CONFIG_FILE} is missing or another program's); give its "
            "train.output_dir"
        )
    _, problems = build(RunConfig, config)
    if problems:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged, or of another version: {problems[0]}")
    results, graphs = folder / RESULTS_FILE, folder / GRAPHS_FOLDER
    return TrainedRun(
        folder=folder,
        config=config,
        lines=_read_lines(folder),
        results=_read_results(results) if results.is_file() else None,
        graphs=AdapterGraphDataset(graphs) if any(graphs.glob("raw/graph-*.pt")) else None,
    )


def look(folder: str | Path, output_dir: str | Path | None = None) -> dict[str, Path]:
    """Write ``look.html``, which needs nothing but itself, and its figures as SVG.

    Args:
        folder: Folder of a finished or running ``structlora train``.
        output_dir: Where ``look.html`` and ``figures/`` go; default: `folder`.

    Returns:
        ``{name: path}`` of all files, by their names in the folder.

    Raises:
        FileNotFoundError, ValueError: See `read_run`; nothing is written then.
        FileExistsError: `output_dir` is a file.
        OSError: The output cannot be written.
    """
    output = Path(output_dir or folder)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output_dir={str(output)!r} is a file; give a folder")
    run = read_run(folder)
    parts = [*_figures(run), *_not_shown(run), Details(title="Settings", text=json.dumps(run.config, indent=2))]
    files: dict[str, str | bytes] = {
        "look.html": page(f"{run.folder.resolve().name}: adapters over training", parts, _lead(run), _facts(run))
    }
    for part in parts:
        if isinstance(part, FigureSection):
            files[f"figures/{part.name}.svg"] = figure_file(part.figure, "svg")
    return {name: replace_file(output / name, content) for name, content in files.items()}


STRUCTURE = (
    "Mean cosine of the updates, and of the gradients, of neighbouring layers of a role; drift energy: the sum over "
    "the same pairs of their squared distance; mean gate: over all directions."
)
DIRICHLET = (
    "How much the features of joined adapters differ after every layer of the coordinator; a layer that brings it "
    "near 0 has made all adapters alike (over-smoothing)."
)
LOSS = "Averaged over stretches of equal length where there are more than 100 steps. Whole: with the auxiliary terms."
EXPORTED = "Cosines between the updates of the exported LoRA; exact."
GRAPH = (
    "Depth downwards, one colour a role; the number in a node is its layer. The wider an edge, the larger its weight; "
    "edges between roles are grey. The paler a node, the more its gates are closed."
)
GATES = "Gates of the rank-one directions, from 0 (closed, left out of the exported update) to 1."
LIKENESS = (
    "Cosines between the codes of the adapters; codes are a random projection of the updates, so these are estimates."
)
ATTENTION = "What a node (row) takes from another (column) at the last recorded step; a row adds up to 1."


def _figures(run: TrainedRun) -> list[Part]:
    """Return the figures of everything that was recorded."""
    lines, label = run.lines, str(run.config["method"]["name"])
    found = [
        _section("Structure over training", "structure", lambda s: structure_curves(lines, label, s), STRUCTURE),
        _section("Smoothing by the coordinator", "dirichlet", lambda s: dirichlet_curves(lines, s), DIRICHLET),
        _section("Training loss", "loss", lambda s: loss_curves(lines, s), LOSS),
        _exported(run),
    ]
    return [*_graph_figures(run.graphs), *(part for part in found if part is not None)]


def _graph_figures(dataset: AdapterGraphDataset | None) -> list[Part]:
    if dataset is None:
        return []
    graphs, names = list(dataset), dataset.node_names or None
    last, few = graphs[-1], [graphs[k] for k in spread(len(graphs), 4)]
    steps = [f"step {int(graph.step)}" for graph in few]
    layers = recorded_attention(last)
    found = [
        _section(
            "The graph at several steps", "graph", lambda s: draw_graphs(few, steps, names, 4.8 if s else 9.0), GRAPH
        ),
        _section("Gates over training", "gates", lambda s: gates_over_training(graphs, names, s), GATES),
        _section("How alike the layers are", "likeness", lambda s: likeness_over_training(graphs, names, s), LIKENESS),
        _section(
            "Attention",
            "attention",
            lambda s: attention_heatmaps(layers, last, names, s) if layers else None,
            ATTENTION,
        ),
    ]
    slider = GraphSlider(title="The adapter graph", graphs=graphs, names=names, caption=GRAPH)
    return [slider, *(part for part in found if part is not None)]


def _exported(run: TrainedRun) -> FigureSection | None:
    found = run.results["structure"] if run.results else None
    if not found:
        return None
    roles = ["".join(c for c in name if not c.isdigit()) for name in found["names"]]
    order = sorted(range(len(roles)), key=lambda i: (roles[i], i))
    table = {"exported": [[found["similarity"][i][j] for j in order] for i in order]}
    names = [found["names"][i] for i in order]
    return _section(
        "How alike the exported updates are", "exported", lambda s: similarity_heatmaps(table, names, s), EXPORTED
    )


def _section(title: str, name: str, draw: Callable[[bool], Figure | None], caption: str) -> FigureSection | None:
    """Return a section with a figure for wide and one for narrow pages; None if there is nothing to draw."""
    wide, narrow = draw(False), draw(True)
    if wide is None:
        return None
    return FigureSection(
        title=title, figure=wide, narrow=narrow, alt=f"{title}. {caption}", caption=caption, name=f"look-{name}"
    )


def _not_shown(run: TrainedRun) -> list[Text]:
    """Return one sentence on what was not recorded, with the settings that record it; nothing if all is there."""
    method = str(run.config["method"]["name"])
    kind = METHODS.get(method)
    looks = [line["structure"] for line in run.lines if "structure" in line]
    is_structlora, watchable = kind is not None and kind.is_structlora, kind is not None and kind.watchable
    missing = []
    if not is_structlora:
        missing.append(f"the adapter graph (method.name={method} has none; method.name=structlora has)")
    elif run.graphs is None:
        missing.append("the adapter graph, its gates and its attention (train.record_every=10 records them)")
    elif not recorded_attention(run.graphs[-1]):
        missing.append("attention (adapter.coordinator.conv=GATv2Conv has it)")
    if watchable and not looks:
        missing.append("structure over training (train.watch_every=10 records it)")
    elif is_structlora and not any(look.get("dirichlet") for look in looks):
        missing.append("smoothing by the coordinator (train.watch_every=10 with a coordinator records it)")
    if run.results is None:
        missing.append("the exported updates (the run is not finished)")
    return [Text(title="Not shown", paragraphs=[f"Not recorded: {'; '.join(missing)}."])] if missing else []


def _lead(run: TrainedRun) -> str:
    """Return what the last recorded graph shows, in a sentence."""
    if run.graphs is None:
        return "No adapter graph was recorded; the curves below are what the run has left."
    last = run.graphs[-1]
    edges, _ = undirected(last)
    crossing = int((last.role[edges[:, 0]] != last.role[edges[:, 1]]).sum())
    text = f"At step {int(last.step)} the graph joins {last.num_nodes} nodes by {len(edges)} edges"
    text += f", {crossing} of them between roles" if crossing else ""
    if "gate" in last:
        gate = last.gate[last.scaling != 0]
        closed = int((gate == 0).sum())
        text += f"; {closed} of {gate.numel()} gates are closed, the mean gate is {float(gate.mean()):.2f}"
    return f"{text}; messages change the updates by {100 * message_share(last):.1f} % of their norm."


def _facts(run: TrainedRun) -> dict[str, str]:
    config = run.config
    steps = sum("loss" in line for line in run.lines)
    facts = {
        "method": str(config["method"]["name"]),
        "task": str(config.get("data", {}).get("task", "")),
        "model": str(config.get("model", {}).get("path", "")),
        "steps": f"{steps}" if run.results else f"{steps} so far",
    }
    kind = METHODS.get(facts["method"])
    if kind is not None and kind.is_structlora:
        facts["convolution"] = str(config["adapter"]["coordinator"]["conv"])
        facts["edges"] = str(config["adapter"]["graph"]["edges"])
    if run.results and (score := run.results["metrics"][run.results["metric"]]) is not None:
        facts[run.results["metric"]] = f"{score:.4f}"
    return {name: text for name, text in facts.items() if text}


def _read_results(file: Path) -> dict[str, Any]:
    found = _read_json(file)
    if problem := misfit(found, Results):
        raise ValueError(f"{file} is damaged, or of another version: {problem}")
    return found


def _read_lines(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = Log(folder, active=False, keep=0).lines()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / METRICS_FILE} is damaged ({short(error)})") from error
    if found := [problem for line in lines if (problem := misfit(line, Line))]:
        raise ValueError(f"{folder / METRICS_FILE} is damaged: {found[0]}")
    return lines


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({short(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (no mapping of names to values)")
    return content
