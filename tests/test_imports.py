"""The direction of imports: recipes → integrations → lazy → trpo → hf → losses → ops → kernels."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["recipes", "integrations", "lazy", "trpo", "hf", "losses", "ops", "kernels", "reference"]
ALLOWED_IN_CORE = {"torch", "triton", "fastrlhf"}
MODULES = sorted((ROOT / "fastrlhf").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))


def imported(path: Path) -> list[str]:
    """Absolute names of the modules that a file imports, lazily ones included."""
    package = path.relative_to(ROOT).parent.parts
    if package and package[0] == "kernels":
        package = ("fastrlhf", *package)
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def layer(module: str) -> str | None:
    """The layer of a module of ours, None for others and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fastrlhf" and len(parts) > 1 and parts[1] in ORDER else None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fastrlhf", *parts) if parts[0] == "kernels" else parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_point_downwards(path: Path) -> None:
    own = layer(module_name(path))
    if own is None:  # the package's own __init__ re-exports
        return
    for name in imported(path):
        other = layer(name)
        if other is not None and other != own:
            assert ORDER.index(other) > ORDER.index(own), f"{own} imports {name}"
            assert (own, other) != ("kernels", "reference"), "kernels and reference are independent"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_only_torch_and_triton(path: Path) -> None:
    own = layer(module_name(path)) or "ops"
    if own in ("recipes", "integrations", "hf"):
        return
    tops = {name.split(".")[0] for name in imported(path)}
    allowed = ALLOWED_IN_CORE | sys.stdlib_module_names
    if own != "kernels":
        allowed = allowed - {"triton"}
    assert tops <= allowed


def test_the_check_sees_what_it_is_for() -> None:
    assert "fastrlhf.kernels.token_stats.token_stats_forward" in imported(
        ROOT / "fastrlhf" / "ops" / "token_stats.py"
    )
    assert layer("fastrlhf.ops.checks.check_mask") == "ops"
