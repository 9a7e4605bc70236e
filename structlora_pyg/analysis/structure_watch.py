"""The former place of `structlora_pyg.analysis.structure.StructureRecorder`."""

from structlora_pyg.analysis.structure import StructureRecorder as StructureWatch
from structlora_pyg.analysis.structure import gate_summary

__all__ = ["StructureWatch", "gate_summary"]
