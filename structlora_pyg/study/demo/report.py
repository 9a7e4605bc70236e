"""What the demo shows: the table for page and terminal, and the page itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data

from structlora_pyg.analysis.graph_plots import draw_graph
from structlora_pyg.analysis.plots import gate_heatmap, similarity_heatmaps, training_curves
from structlora_pyg.analysis.structure import Structure
from structlora_pyg.study.report.page import Details, FigureSection, Part, Table, Text, write_report
from structlora_pyg.study.stats import format_p

BASELINE, METHOD = "LoRA", "StructLoRA"


def result_table(results: Mapping[str, Any]) -> Table:
    """Return the comparison, one row a quantity, from what `structlora_pyg.study.demo.run.run_demo` measured."""
    parameters, milliseconds = results["parameters"], results["milliseconds_per_step"]
    rates, seeds = results["learning_rates"], results["settings"]["seeds"]
    p = format_p(results["comparison"]["accuracy"]["p_t"])

    def both(kind: str) -> list[str]:
        return [f"{parameters[method][kind]:,}" for method in (BASELINE, METHOD)]

    rows = [
        ["Test accuracy, %", *_cells(results, "accuracy", 2), p],
        ["Drift energy, relative", *_cells(results, "relative_drift", 2), ""],
        ["Adjacent-layer cosine", *_cells(results, "adjacent_cosine", 3), ""],
        ["Open gates, %", "", _mean_sd(results, METHOD, "open_gates", 1), "", ""],
        ["Mean gate", "", _mean_sd(results, METHOD, "mean_gate", 2), "", ""],
        ["Adapter parameters, exported", *both("adapter"), "", ""],
        ["Head parameters, exported", *both("head"), "", ""],
        ["Training-only parameters", *both("training_only"), "", ""],
        [
            "Time a step, ms",
            *(f"{milliseconds[method]:.1f}" for method in (BASELINE, METHOD)),
            f"{milliseconds['ratio']:.2f} x",
            "",
        ],
        ["Learning rate, chosen", *(f"{rates[method]['lr']:g}" for method in (BASELINE, METHOD)), "", ""],
    ]
    return Table(
        title="Result",
        columns=["", BASELINE, METHOD, "difference [95 % CI]", "paired t-test"],
        rows=rows,
        note=(
            f"Mean ± standard deviation over {seeds} paired seeds. Only the accuracy is tested; drift, cosine and "
            "gates describe what the methods did. Time: median of steps taken in turns. The graph pass costs the same "
            "whatever the batch, so that it shows most on a model as small as this one."
        ),
    )


def export_sentence(export: Mapping[str, Any]) -> str:
    """Return what the check of the exported folder found."""
    return (
        "The exported folder, loaded by peft.PeftModel.from_pretrained on a fresh base: largest difference of logits "
        f"{export['max_logit_difference']:.1e} over {export['pictures']} test pictures; identical predictions: "
        f"{'yes' if export['identical_predictions'] else 'no'}."
    )


def write_demo_report(path: Path, results: Mapping[str, Any], structures: Mapping[str, Structure], graph: Data) -> Path:
    """Write the page.

    Args:
        path: The HTML file.
        results: From `structlora_pyg.study.demo.run.run_demo`.
        structures: Structure of the updates of the first seed, ``{method: ...}``.
        graph: Adapter graph of the first seed's StructLoRA model.
    """
    settings, milliseconds = results["settings"], results["milliseconds_per_step"]
    parts: list[Part] = [
        result_table(results),
        _curves(results),
        _gates(results, graph),
        _similarity(structures),
        _graph(graph),
        _protocol(results),
        Text(title="The exported adapter", paragraphs=[export_sentence(results["export"])]),
        _every_seed(results),
        Details(title="Settings", text=json.dumps(settings, indent=2)),
        Details(title="Versions", text=json.dumps(results["versions"], indent=2)),
    ]
    facts = {
        "task": "digits 5-9, 10 examples a class",
        "model": "vision transformer of 6 layers, pretrained on digits 0-4",
        "seeds": str(settings["seeds"]),
        "steps": str(settings["steps"]),
        "step time": f"{milliseconds['ratio']:.2f} x LoRA",
    }
    return write_report(path, "StructLoRA and LoRA learn new digits", parts, results["verdict"], facts)


def by_role(names: list[str], graph: Data) -> list[int]:
    """Return the order of the nodes that puts those of one role together, by depth."""
    return sorted(range(len(names)), key=lambda i: (int(graph.role[i]), int(graph.depth[i])))


def _cells(results: Mapping[str, Any], name: str, digits: int) -> list[str]:
    pair = results["comparison"][name]
    difference = f"{pair['difference']:+.{digits}f} [{pair['low']:+.{digits}f}, {pair['high']:+.{digits}f}]"
    return [*(_mean_sd(results, method, name, digits) for method in (BASELINE, METHOD)), difference]


def _mean_sd(results: Mapping[str, Any], method: str, name: str, digits: int) -> str:
    value = results["methods"][method][name]
    return f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}"


def _curves(results: Mapping[str, Any]) -> FigureSection:
    runs, seeds = results["runs"], results["settings"]["seeds"]
    panels = {
        title: {
            method: (np.array(runs[method][0]["curve_steps"]), np.array([run[key] for run in runs[method]]))
            for method in (BASELINE, METHOD)
        }
        for title, key in (("Training loss", "loss"), ("Validation accuracy, %", "validation"))
    }
    marks = {"filter and graph on": results["settings"]["structlora"]["schedule"]["warmup_steps"]}
    ends = ", ".join(
        f"{method} {np.mean([run['validation'][-1] for run in runs[method]]):.1f} %" for method in (BASELINE, METHOD)
    )
    return FigureSection(
        title="Training",
        figure=training_curves(panels, marks),
        narrow=training_curves(panels, marks, stacked=True),
        alt=(
            f"Training loss and validation accuracy by optimizer step, mean of {seeds} seeds with a band of one "
            f"standard deviation. Final validation accuracy: {ends}."
        ),
        caption=(
            f"Mean and one standard deviation over {seeds} seeds. The validation pictures chose the learning rates; "
            "they are neither trained nor tested on."
        ),
    )


def _gates(results: Mapping[str, Any], graph: Data) -> FigureSection:
    order = by_role(graph.name, graph)
    gate = graph.gate[order]
    closed = int((gate == 0).sum())
    seed = results["runs"][METHOD][0]["seed"]
    return FigureSection(
        title="Gates",
        figure=gate_heatmap(gate, [graph.name[i] for i in order]),
        alt=(
            f"Heat map of {gate.size(0)} adapters by {gate.size(1)} directions. {closed} of {gate.numel()} gates are "
            f"closed; the others lie between {float(gate[gate > 0].min()) if closed < gate.numel() else 0:.2f} and "
            f"{float(gate.max()):.2f}."
        ),
        caption=(
            f"Gates of the rank-one directions after training, seed {seed}. One row an adapter (layer, q or v); "
            f"{closed} of {gate.numel()} are closed. Gates are folded into the exported adapter."
        ),
    )


def _similarity(structures: Mapping[str, Structure]) -> FigureSection:
    names = structures[METHOD].names
    order = torch.tensor(sorted(range(len(names)), key=lambda i: (names[i].partition("[")[2], i)))
    cosines = {method: found.similarity[order][:, order].numpy() for method, found in structures.items()}
    shown = [names[i] for i in order]
    said = ", ".join(f"{method} {found.adjacent_cosine:+.3f}" for method, found in structures.items())
    return FigureSection(
        title="How alike the layers' updates are",
        figure=similarity_heatmaps(cosines, shown),
        narrow=similarity_heatmaps(cosines, shown, stacked=True),
        alt=f"Two heat maps of cosines between layers' updates. Mean over adjacent layers of a role: {said}.",
        caption=(
            "Cosines between the updates of all adapters, first seed, without and with coordination. Mean over "
            f"adjacent layers of a role: {said}."
        ),
    )


def _graph(graph: Data) -> FigureSection:
    count = graph.edge_index.size(1) // 2
    crossing = int((graph.role[graph.edge_index[0]] != graph.role[graph.edge_index[1]]).sum()) // 2
    return FigureSection(
        title="The adapter graph",
        figure=draw_graph(graph),
        alt=(
            f"Graph of {graph.num_nodes} adapters in two rows, q and v, by depth, with {count} edges; {crossing} of "
            "them join q and v."
        ),
        caption=(
            f"The graph the coordinator passes messages on at the end of training, first seed: {count} edges, the "
            "chain of neighbouring layers and edges between adapters whose gradients are alike."
        ),
    )


def _protocol(results: Mapping[str, Any]) -> Text:
    s = results["settings"]
    rates = ", ".join(f"{lr:g}" for lr in s["learning_rates"])
    tuning, gates = min(s["tuning_seeds"], s["seeds"]), s["structlora"]["filter"]
    first = "the first seed" if tuning == 1 else f"the first {tuning} seeds" if tuning < s["seeds"] else "all seeds"
    return Text(
        title="How it was measured",
        paragraphs=[
            (
                f"Both methods see the same {s['examples_per_class']} labelled pictures a class in the same order, "
                "from the same head and the same lora_A, with the same optimizer and number of steps. A seed fixes all "
                "of these. The baseline is stock PEFT: rank 4 on q and on v, the very entries that StructLoRA trains."
            ),
            (
                f"Each method chose its learning rate among {rates} by its mean accuracy over {first} on "
                f"{s['validation_pictures']} labelled pictures that are not trained on. StructLoRA otherwise runs with "
                f"the library's defaults, but for strong gates (beta {gates['beta']:g}, init_logit "
                f"{gates['init_logit']:g}). The {s['test_pictures']} test pictures were looked at once a seed and "
                "method."
            ),
            (
                "The difference is the mean over seeds of StructLoRA minus LoRA, with Student's t interval. It is "
                "called better or worse only if p < 0.05."
            ),
        ],
    )


def _every_seed(results: Mapping[str, Any]) -> Table:
    runs = results["runs"]
    rows = [
        [
            str(plain["seed"]),
            f"{plain['accuracy']:.2f}",
            f"{ours['accuracy']:.2f}",
            f"{ours['accuracy'] - plain['accuracy']:+.2f}",
        ]
        for plain, ours in zip(runs[BASELINE], runs[METHOD], strict=True)
    ]
    wilcoxon = format_p(results["comparison"]["accuracy"]["p_wilcoxon"])
    least = 2 / 2 ** len(rows)
    return Table(
        title="Test accuracy of every seed, %",
        columns=["seed", BASELINE, METHOD, "difference"],
        rows=rows,
        note=f"Wilcoxon signed-rank test: {wilcoxon}; with {len(rows)} seeds it cannot be below {least:.4f}.",
    )
