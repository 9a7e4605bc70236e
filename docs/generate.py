"""Write docs/configuration.md and docs/api.md from the code: ``python docs/generate.py`` (``--check`` only compares)."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path

import structlora_pyg
from structlora_pyg import cli, config

HERE = Path(__file__).parent
SECTIONS = {
    "model": config.ModelConfig,
    "data": config.DataConfig,
    "adapter": config.StructLoraConfig,
    "adapter.graph": config.GraphConfig,
    "adapter.encoding": config.EncodingConfig,
    "adapter.filter": config.FilterConfig,
    "adapter.coordinator": config.CoordinatorConfig,
    "adapter.schedule": config.ScheduleConfig,
    "train": config.TrainConfig,
}


def arguments(cls: type) -> dict[str, str]:
    """Return the argument descriptions of a google docstring."""
    block = inspect.getdoc(cls).partition("Args:\n")[2].partition("\n\n")[0]
    parts = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block, flags=re.M)
    return {name: " ".join(text.split()) for name, text in parts}


def intro(cls: type) -> str:
    """Return the docstring up to its first section, as one paragraph a paragraph."""
    text = re.split(r"\n\n(?:Args|Raises|Returns|Attributes):", inspect.getdoc(cls))[0]
    return "\n\n".join(" ".join(p.split()) for p in text.split("\n\n"))


def default(field: dataclasses.Field) -> str:
    """Return a field's default in the notation of YAML."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    words = {None: "none", True: "true", False: "false", "": '""'}
    if isinstance(value, (list, dict)):
        return "`{}`" if not value else f"`{value}`"
    if isinstance(value, float):
        return f"`{value:.4g}`"
    return f"`{words.get(value, value) if isinstance(value, (str, bool, type(None))) else value}`"


def configuration() -> str:
    """Return the configuration reference."""
    lines = [
        "# Configuration",
        "",
        "Generated from the dataclasses in `structlora_pyg/config.py` by `python docs/generate.py`.",
        "",
        "A run is one YAML file, or the name of a shipped one, and any number of `key.sub=value` overrides:",
        "",
        "```bash",
        "structlora train --config rte adapter.coordinator.conv=GATv2Conv train.lr=1e-4",
        "```",
        "",
        "Every problem is reported at once, with the nearest valid key, before anything is loaded "
        "(`structlora validate`). Without the command line, `StructLoraConfig` takes the keys of `adapter` as keyword "
        "arguments.",
        "",
        f"Shipped: {', '.join(f'`{name}`' for name in config.shipped_configs())}.",
    ]
    for name, cls in SECTIONS.items():
        known = arguments(cls)
        fields = [f for f in dataclasses.fields(cls) if f.name in known and f.name not in config.SECTIONS]
        rows = [f"| `{f.name}` | {default(f)} | {known[f.name].replace('|', chr(92) + '|')} |" for f in fields]
        lines += ["", f"## `{name}`", "", intro(cls), "", "| key | default | meaning |", "| --- | --- | --- |", *rows]
    lines += ["", "## Keys of the commands", ""]
    for name, (_, kind) in cli.COMMANDS.items():
        for key, text in arguments(kind).items() if "Args:" in (kind.__doc__ or "") else ():
            lines.append(f"- `structlora {name} {key}=...`: {text}")
    return "\n".join(lines) + "\n"


def api() -> str:
    """Return the reference of all public names."""
    lines = [
        "# API",
        "",
        "Generated from the docstrings by `python docs/generate.py`. Everything here is imported from "
        "`structlora_pyg`.",
    ]
    for name in structlora_pyg.__all__:
        item = getattr(structlora_pyg, name)
        lines += ["", f"## `{name}`", "", *_entry(item)]
        if inspect.isclass(item):
            for key, member in vars(item).items():
                documented = inspect.isfunction(member) or isinstance(member, (property, classmethod))
                if documented and not key.startswith("_") and inspect.getdoc(getattr(item, key)):
                    lines += ["", f"### `{name}.{key}`", "", *_entry(getattr(item, key))]
    return "\n".join(lines) + "\n"


def _entry(item: object) -> list[str]:
    try:
        signature = [f"`{getattr(item, '__name__', '')}{inspect.signature(item)}`", ""]
    except (TypeError, ValueError):
        signature = []
    text = textwrap.dedent(inspect.getdoc(item) or "")
    return [*(s.replace("'", "") for s in signature), "```text", text, "```"]


def main() -> int:
    """Write the files, or compare them with ``--check``; return 1 if they differ."""
    stale = []
    for file, content in ((HERE / "configuration.md", configuration()), (HERE / "api.md", api())):
        if "--check" not in sys.argv:
            file.write_text(content, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != content:
            stale.append(file.name)
    if stale:
        print(f"{', '.join(stale)} out of date; run python docs/generate.py")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
