"""The harness: what a run is, how it is trained, and how many are compared."""

from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def shipped_configs() -> dict[str, Path]:
    """Return the YAML files that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
