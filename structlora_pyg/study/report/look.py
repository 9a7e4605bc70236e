"""``structlora look``: one page, and its figures as files, of what a run did over training."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from structlora_pyg.checks import short
from structlora_pyg.data.dataset import AdapterGraphDataset
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.methods import METHODS, Method
from structlora_pyg.study.report.page import Section, save_report
from structlora_pyg.study.run_folder import (
    GRAPHS_FOLDER,
    METRICS_FILE,
    RESULTS_FILE,
    config_to_dict,
    read_lines,
    stored_config,
)

STRUCTURE = {
    "Adjacent-layer cosine": "structure.adjacent_cosine",
    "Cosine of the gradients": "structure.gradient_cosine",
    "Drift energy": "structure.drift_energy",
    "Mean gate": "structure.mean_gate",
    "Mean noise level": "structure.noise_level",
    "Change by the filter": "structure.filter_moves",
    "Change by the coordinator": "structure.coordinator_moves",
}
COLUMNS = ["step", "loss", "auxiliary", "total", *STRUCTURE.values(), "structure.dirichlet"]
CURVE_POINTS = 100  # longer curves are averaged over stretches of equal length
FIGURES = {
    "graph": (
        "The adapter graph",
        "Wide edges have large weights, grey ones join roles; pale nodes have closed gates.",
    ),
    "attention": ("Attention", "What a node (row) takes from another (column) at the last step; rows add up to 1."),
    "structure": (
        "Structure over training",
        "Over neighbouring layers of a role; drift energy: sum of squared distances.",
    ),
    "dirichlet": ("Smoothing by the coordinator", "Near 0, a layer has made the features of joined adapters alike."),
    "loss": ("Training loss", f"Means of stretches beyond {CURVE_POINTS} steps; total: with the auxiliary terms."),
    "exported": ("How alike the exported updates are", "Exact cosines between the updates of the exported LoRA."),
}


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What a run of ``structlora train``, finished or not, has left so far."""

    folder: Path
    config: RunConfig
    method: type[Method]
    log: pd.DataFrame  # metrics.jsonl, one row per line and the columns `COLUMNS`, NaN where a line has no value
    results: dict[str, Any]  # empty while it is running
    graphs: Sequence[Data]  # the recorded adapter graphs


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
    sections = [
        Section(title=FIGURES[k][0], figure=drawn, alt=". ".join(FIGURES[k]), caption=FIGURES[k][1], name=f"look-{k}")
        for k, drawn in _figures(run).items()
    ]
    if missing := _not_recorded(run):
        sections.append(Section(title="Not shown", text=f"Not recorded: {'; '.join(missing)}."))
    sections.append(Section(title="Settings", code=json.dumps(config_to_dict(run.config), indent=2), fold=True))
    title = f"{run.folder.resolve().name}: adapters over training"
    return save_report(output_dir or folder, "look", title, sections, _lead(run), _facts(run))


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
    graphs, config = folder / GRAPHS_FOLDER, stored_config(folder)
    return TrainedRun(
        folder=folder,
        config=config,
        method=METHODS[config.method.name],
        log=pd.json_normalize(_read(folder / METRICS_FILE)).reindex(columns=COLUMNS),
        results=_read(folder / RESULTS_FILE)[0] if (folder / RESULTS_FILE).is_file() else {},
        graphs=AdapterGraphDataset(graphs) if any(graphs.glob("raw/graph-*.pt")) else [],
    )


def recorded_attention(graph: Data) -> list[tuple[Tensor, Tensor]]:
    """Return the attention weights that were recorded with a graph, layer by layer; empty if there are none."""
    found: list[tuple[Tensor, Tensor]] = []
    while f"attention_{len(found)}" in graph:
        found.append((graph[f"attention_index_{len(found)}"], graph[f"attention_{len(found)}"]))
    return found


def _figures(run: TrainedRun) -> dict[str, Figure]:
    """Return the figures of what a run has left so far, by their names in `FIGURES`."""
    log, method, found = run.log, run.method.name, {}
    if len(run.graphs):
        graphs, names = list(run.graphs), getattr(run.graphs, "node_names", None) or None
        few = [graphs[k] for k in plots.evenly(len(graphs), 4)]
        found["graph"] = draw_graphs(few, [f"step {int(graph.step)}" for graph in few], names)
        if attention := recorded_attention(graphs[-1]):
            found["attention"] = plots.attention_heatmaps(attention, graphs[-1], names)
    points = {title: log[["step", column]].dropna() for title, column in STRUCTURE.items()}
    panels = {title: {method: (rows["step"], rows.iloc[:, 1])} for title, rows in points.items() if len(rows)}
    if panels:
        found["structure"] = plots.training_curves(panels)
    energies = log[["step", "structure.dirichlet"]].dropna()
    if len(energies):
        layers = enumerate(np.stack(energies["structure.dirichlet"].to_list()).T)
        curves = {f"layer {k}" if k else "input": (energies["step"], energy) for k, energy in layers}
        found["dirichlet"] = plots.training_curves({"Dirichlet energy": curves})
    steps = log.dropna(subset=["loss"])
    if len(steps):
        stretches = steps.groupby(np.arange(len(steps)) // -(-len(steps) // CURVE_POINTS))
        kinds = ["total", "loss"] if steps["auxiliary"].any() else ["loss"]
        curves = {key: (stretches["step"].last(), stretches[key].mean()) for key in kinds}
        found["loss"] = plots.training_curves({"Training loss": curves})
    if structure := run.results.get("structure"):
        names = structure["names"]
        order = sorted(range(len(names)), key=lambda i: ("".join(c for c in names[i] if not c.isdigit()), i))
        table = np.asarray(structure["similarity"])[np.ix_(order, order)]
        found["exported"] = plots.similarity_heatmaps({"exported": table}, [names[i] for i in order])
    return found


def _not_recorded(run: TrainedRun) -> list[str]:
    """Return what was not recorded, with the settings that record it; nothing if all is there."""
    graph, empty = run.method.is_structlora, run.log.isna().all()
    missing = {
        f"the adapter graph (method.name={run.method.name} has none; method.name=structlora has)": not graph,
        "the adapter graph and its attention (train.record_every=10 records them)": graph and not len(run.graphs),
        "attention (adapter.coordinator.conv=GATv2Conv has it)": len(run.graphs)
        and not recorded_attention(run.graphs[-1]),
        "structure over training (train.watch_every=10 records it)": run.method.has_updates
        and empty[[*STRUCTURE.values()]].all(),
        "the exported updates (the run is not finished)": not run.results,
    }
    return [text for text, is_missing in missing.items() if is_missing]


def _lead(run: TrainedRun) -> str:
    """Return what the last recorded graph shows, in a sentence."""
    if not len(run.graphs):
        return "No adapter graph was recorded; the curves below are what the run has left."
    last = run.graphs[-1]
    text = f"At step {int(last.step)} the graph joins {last.num_nodes} nodes by {len(undirected(last)[0])} edges"
    if "gate" in last:
        gate = last.gate[last.scaling != 0]
        closed = int((gate == 0).sum())
        text += f"; {closed} of {gate.numel()} gates are closed, the mean gate is {float(gate.mean()):.2f}"
    if "message" in last:
        before = (last.x - last.message).norm().clamp(min=1e-12)  # the codes that the messages were added to
        text += f"; messages change the updates by {100 * float(last.message.norm() / before):.1f} % of their norm"
    return f"{text}."


def _facts(run: TrainedRun) -> dict[str, str]:
    config, steps = run.config, int(run.log["loss"].notna().sum())
    facts = {
        "method": run.method.name, "task": config.data.task, "model": config.model.path,
        "steps": f"{steps}" if run.results else f"{steps} so far",
    }  # fmt: skip
    if run.method.is_structlora:
        facts |= {"convolution": str(config.adapter.coordinator.conv), "edges": str(config.adapter.graph.edges)}
    if run.results and (score := run.results["metrics"][run.results["metric"]]) is not None:
        facts[run.results["metric"]] = f"{score:.4f}"
    return {name: text for name, text in facts.items() if text}


def _read(file: Path) -> list[Any]:
    """Return the lines of a ``.jsonl`` file, or a list of what another file holds."""
    try:
        found = read_lines(file) if file.suffix == ".jsonl" else [json.loads(file.read_text(encoding="utf-8"))]
        return [dict(item) for item in found]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged, or of another version: {short(error)}") from error
