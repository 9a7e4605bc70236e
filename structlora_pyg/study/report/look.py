"""``structlora look``: one page, and its figures as files, of what a run did over training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from torch_geometric.data import Data

from structlora_pyg.analysis import plots
from structlora_pyg.analysis.graph_plot import draw_graphs, undirected
from structlora_pyg.data.dataset import AdapterGraphDataset
from structlora_pyg.files import short
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.config_files import parse_config
from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.report.page import Section, save_report
from structlora_pyg.study.run_folder import CONFIG_FILE, GRAPHS_FOLDER, METRICS_FILE, RESULTS_FILE, read_lines
from structlora_pyg.study.schema import Line, Results, misfit

STRUCTURE = {
    "Adjacent-layer cosine": "structure.adjacent_cosine",
    "Cosine of the gradients": "structure.gradient_cosine",
    "Drift energy": "structure.drift_energy",
    "Mean gate": "structure.mean_gate",
}
CURVE_POINTS = 100  # longer curves are averaged over stretches of equal length


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What a run of ``structlora train``, finished or not, has left so far.

    Attributes:
        folder: Its folder.
        config: Its configuration, nested.
        log: ``metrics.jsonl``, one row per line; what was measured of the structure is in columns ``structure.*``.
        results: ``results.json``; None while it is running.
        graphs: The recorded adapter graphs; None if there are none.
    """

    folder: Path
    config: dict[str, Any]
    log: pd.DataFrame
    results: dict[str, Any] | None
    graphs: AdapterGraphDataset | None

    @property
    def is_structlora(self) -> bool:
        """Whether the method coordinates its adapters, so that there is a graph to record."""
        return METHODS[self.config["method"]["name"]].is_structlora


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
    run = read_run(folder)
    settings = Section(title="Settings", code=json.dumps(run.config, indent=2), fold=True)
    sections = [*_graph_sections(run.graphs), *_curve_sections(run), *_exported(run), *_not_shown(run), settings]
    title = f"{run.folder.resolve().name}: adapters over training"
    return save_report(output_dir or folder, "look", title, sections, _lead(run), _facts(run), markdown=False)


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
    _, problems = parse_config(RunConfig, config)
    if problems:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged, or of another version: {problems[0]}")
    file, graphs = folder / RESULTS_FILE, folder / GRAPHS_FOLDER
    results = _read_json(file) if file.is_file() else None
    if results is not None and (problem := misfit(results, Results)):
        raise ValueError(f"{file} is damaged, or of another version: {problem}")
    return TrainedRun(
        folder=folder,
        config=config,
        log=pd.json_normalize(_read_lines(folder)),
        results=results,
        graphs=AdapterGraphDataset(graphs) if any(graphs.glob("raw/graph-*.pt")) else None,
    )


def recorded_attention(graph: Data) -> list[tuple[Tensor, Tensor]]:
    """Return the attention weights that were recorded with a graph, layer by layer; empty if there are none."""
    found: list[tuple[Tensor, Tensor]] = []
    while f"attention_{len(found)}" in graph:
        found.append((graph[f"attention_index_{len(found)}"], graph[f"attention_{len(found)}"]))
    return found


def message_share(graph: Data) -> float:
    """Return the norm of the messages relative to the codes they were added to; 0 without messages."""
    if "message" not in graph:
        return 0.0
    before = float((graph.x - graph.message).norm())
    return float(graph.message.norm()) / before if before > 0 else 0.0


def _graph_sections(dataset: AdapterGraphDataset | None) -> list[Section]:
    if dataset is None:
        return []
    graphs, names = list(dataset), dataset.node_names or None
    few = [graphs[k] for k in plots.evenly(len(graphs), 4)]
    drawing = draw_graphs(few, [f"step {int(graph.step)}" for graph in few], names)
    found = [
        _section(
            "The adapter graph", "graph", drawing,
            "Depth from left to right, one row and one colour per role; the number in a node is its layer. The wider "
            "an edge, the larger its weight; edges between roles are grey. The paler a node, the more its gates are "
            "closed.",
        ),
        _section(
            "Gates over training", "gates", plots.gates_over_training(graphs, names),
            "Gates of the rank-one directions, from 0 (closed, left out of the exported update) to 1.",
        ),
        _section(
            "How alike the layers are", "likeness", plots.likeness_over_training(graphs, names),
            "Cosines between the codes of the adapters; codes are a random projection of the updates, so these are "
            "estimates.",
        ),
    ]  # fmt: skip
    if layers := recorded_attention(graphs[-1]):
        caption = "What a node (row) takes from another (column) at the last recorded step; a row adds up to 1."
        figure = plots.attention_heatmaps(layers, graphs[-1], names)
        found.append(_section("Attention", "attention", figure, caption))
    return found


def _curve_sections(run: TrainedRun) -> list[Section]:
    """Return the curves of what the log holds: structure, smoothing and loss."""
    log, method, found = run.log, str(run.config["method"]["name"]), []
    panels = {}
    for title, column in STRUCTURE.items():
        points = log[["step", column]].dropna() if column in log else []
        if len(points):
            panels[title] = {method: (points["step"], points[column])}
    if panels:
        caption = (
            "Mean cosine of the updates, and of the gradients, of neighbouring layers of a role; drift energy: the sum "
            "over the same pairs of their squared distance; mean gate: over all directions."
        )
        found.append(_section("Structure over training", "structure", plots.training_curves(panels), caption))
    energies = log[["step", "structure.dirichlet"]].dropna() if "structure.dirichlet" in log else []
    if len(energies):
        values = np.stack(energies["structure.dirichlet"].to_list()).T
        curves = {f"layer {k}" if k else "input": (energies["step"], energy) for k, energy in enumerate(values)}
        caption = (
            "How much the features of joined adapters differ after every layer of the coordinator; a layer that brings "
            "it near 0 has made all adapters alike (over-smoothing)."
        )
        figure = plots.training_curves({"Dirichlet energy": curves})
        found.append(_section("Smoothing by the coordinator", "dirichlet", figure, caption))
    steps = log.dropna(subset=["loss"]) if "loss" in log else log
    if len(steps):
        stretches = steps.groupby(np.arange(len(steps)) // -(-len(steps) // CURVE_POINTS))
        kinds = {"whole": "loss", "task": "task"} if steps["auxiliary"].any() else {"task": "task"}
        curves = {label: (stretches["step"].last(), stretches[key].mean()) for label, key in kinds.items()}
        caption = (
            f"Averaged over stretches of equal length where there are more than {CURVE_POINTS} steps. Whole: with the "
            "auxiliary terms."
        )
        found.append(_section("Training loss", "loss", plots.training_curves({"Training loss": curves}), caption))
    return found


def _exported(run: TrainedRun) -> list[Section]:
    found = run.results["structure"] if run.results else None
    if not found:
        return []
    names = found["names"]
    order = sorted(range(len(names)), key=lambda i: ("".join(c for c in names[i] if not c.isdigit()), i))
    table = np.asarray(found["similarity"])[np.ix_(order, order)]
    figure = plots.similarity_heatmaps({"exported": table}, [names[i] for i in order])
    caption = "Cosines between the updates of the exported LoRA; exact."
    return [_section("How alike the exported updates are", "exported", figure, caption)]


def _section(title: str, name: str, figure: Figure, caption: str) -> Section:
    return Section(title=title, figure=figure, alt=f"{title}. {caption}", caption=caption, name=f"look-{name}")


def _not_shown(run: TrainedRun) -> list[Section]:
    """Return one sentence on what was not recorded, with the settings that record it; nothing if all is there."""
    method, log, missing = str(run.config["method"]["name"]), run.log, []
    if not run.is_structlora:
        missing.append(f"the adapter graph (method.name={method} has none; method.name=structlora has)")
    elif run.graphs is None:
        missing.append("the adapter graph, its gates and its attention (train.record_every=10 records them)")
    elif not recorded_attention(run.graphs[-1]):
        missing.append("attention (adapter.coordinator.conv=GATv2Conv has it)")
    if METHODS[method].has_updates and not any(column.startswith("structure.") for column in log):
        missing.append("structure over training (train.watch_every=10 records it)")
    elif run.is_structlora and ("structure.dirichlet" not in log or not log["structure.dirichlet"].notna().any()):
        missing.append("smoothing by the coordinator (train.watch_every=10 with a coordinator records it)")
    if run.results is None:
        missing.append("the exported updates (the run is not finished)")
    return [Section(title="Not shown", text=f"Not recorded: {'; '.join(missing)}.")] if missing else []


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
    steps = int(run.log["loss"].notna().sum()) if "loss" in run.log else 0
    facts = {
        "method": str(config["method"]["name"]),
        "task": str(config.get("data", {}).get("task", "")),
        "model": str(config.get("model", {}).get("path", "")),
        "steps": f"{steps}" if run.results else f"{steps} so far",
    }
    if run.is_structlora:
        facts["convolution"] = str(config["adapter"]["coordinator"]["conv"])
        facts["edges"] = str(config["adapter"]["graph"]["edges"])
    if run.results and (score := run.results["metrics"][run.results["metric"]]) is not None:
        facts[run.results["metric"]] = f"{score:.4f}"
    return {name: text for name, text in facts.items() if text}


def _read_lines(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = read_lines(folder / METRICS_FILE)
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
