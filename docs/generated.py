"""Parts of the pages that are made from the code while Sphinx builds: nothing generated is kept."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path

import jupytext
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study import shipped_configs
from structlora_pyg.study.config import RunConfig


class Generated(SphinxDirective):
    """A directive that is replaced by the Markdown of `text`."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """Parse the text where the directive stands."""
        container = nodes.container()
        lines = StringList(self.text().splitlines(), source=self.get_source_info()[0])
        self.state.nested_parse(lines, self.content_offset, container, match_titles=True)
        return container.children

    def text(self) -> str:
        """Return Markdown."""
        raise NotImplementedError


class ConfigurationReference(Generated):
    """Every key of a run: default and meaning, from the dataclasses and their docstrings."""

    def text(self) -> str:
        """Return a section for every section of the configuration."""
        shipped = ", ".join(f"`{name}`" for name in shipped_configs())
        return "\n".join([f"Shipped: {shipped}.", "", *self._section("", RunConfig)])

    def _section(self, prefix: str, cls: type) -> list[str]:
        known, lines, below = _arguments(cls), [], []
        hints = typing.get_type_hints(cls)
        rows = []
        for field in (f for f in dataclasses.fields(cls) if f.init):
            kind = hints.get(field.name)
            if dataclasses.is_dataclass(kind) or kind is StructLoraConfig:
                below += self._section(f"{prefix}{field.name}.", kind)
            elif field.name in known:
                rows.append(f"| `{field.name}` | {_default(field)} | {known[field.name].replace('|', chr(92) + '|')} |")
        if prefix:
            lines += [f"## `{prefix[:-1]}`", "", _intro(cls), ""]
        if rows:
            lines += ["| key | default | meaning |", "| --- | --- | --- |", *rows, ""]
        return lines + below


class CommandReference(Generated):
    """What ``--help`` prints, of every command."""

    def text(self) -> str:
        """Return a section for every command."""
        lines = []
        for command in re.findall(r"^ {4}([a-z]+) ", _help(), flags=re.M):
            lines += [f"## `structlora {command}`", "", "```text", _help(command), "```", ""]
        return "\n".join(lines)


class ConvolutionTable(Generated):
    """What the library makes of every convolution of PyG, by trying each."""

    def text(self) -> str:
        """Return the table."""
        from structlora_pyg.analysis.inspect import conv_reports

        lines = [
            "| name | works | as relations | edge information it uses | why not |",
            "| --- | --- | --- | --- | --- |",
        ]
        for r in conv_reports():
            used = ", ".join(f"`{n}`" for n in r.edge_information) or ("none" if r.works else "")
            works, hetero = "yes" if r.works else "no", f"`{r.hetero}`" if r.hetero else ""
            lines.append(f"| `{r.name}` | {works} | {hetero} | {used} | {r.reason.replace('|', chr(92) + '|')} |")
        return "\n".join(lines)


class PackageReference(Generated):
    """Every module of a package, by autodoc."""

    required_arguments = 1

    def text(self) -> str:
        """Return a section for every module."""
        package = import_module(self.arguments[0])
        lines = []
        modules = (m for m in pkgutil.iter_modules(package.__path__) if not m.ispkg)
        for module in sorted(modules, key=lambda m: m.name):
            name = f"{package.__name__}.{module.name}"
            lines += [f"## {name}", "", "```{eval-rst}", f".. automodule:: {name}", "```", ""]
        return "\n".join(lines)


def _help(*command: str) -> str:
    """Return what ``structlora ... --help`` prints."""
    words = [sys.executable, "-m", "structlora_pyg", *command, "--help"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def _arguments(cls: type) -> dict[str, str]:
    """Return the descriptions of the arguments in a docstring."""
    block = inspect.getdoc(cls).partition("Args:\n")[2].partition("\n\n")[0]
    parts = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block, flags=re.M)
    return {name: " ".join(text.split()) for name, text in parts}


def _intro(cls: type) -> str:
    """Return a docstring up to its first section."""
    text = re.split(r"\n\n(?:Args|Raises|Returns|Attributes):", inspect.getdoc(cls))[0]
    return "\n\n".join(" ".join(p.split()) for p in text.split("\n\n"))


def _default(field: dataclasses.Field) -> str:
    """Return a default as YAML writes it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, float):
        return f"`{value:.4g}`"
    words = {None: "none", True: "true", False: "false", "": '""'}
    return f"`{words.get(value, value) if isinstance(value, (str, bool, type(None))) else value}`"


def write_notebooks(app: Sphinx) -> None:
    """Write every tutorial as a notebook beside it, for its page to offer."""
    for page in Path(app.srcdir, "tutorials").glob("*.md"):
        jupytext.write(jupytext.read(page), page.with_suffix(".ipynb"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("configuration-reference", ConfigurationReference)
    app.add_directive("command-reference", CommandReference)
    app.add_directive("convolution-table", ConvolutionTable)
    app.add_directive("package-reference", PackageReference)
    app.connect("builder-inited", write_notebooks)
    return {"parallel_read_safe": True}
