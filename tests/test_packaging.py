"""The package as users get it: wheel and sdist, installed where nothing else of this tree is seen;
what a type checker and an index make of them; bare imports, and a kernels/ folder that shadows
nobody.
"""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from datetime import date
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import torch
import yaml

import fastrlhf

ROOT = Path(__file__).parent.parent
KERNEL_FILES = {path.name for path in (ROOT / "kernels").glob("*.py")}


def run_python(code: str, *, path: Path | str = "", blocked: tuple[str, ...] = ()) -> str:
    """Run code in a fresh interpreter in which the blocked packages cannot be found."""
    block = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    if path:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", block + code],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist of this tree."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    # A copy, so that the build leaves nothing behind; links stay links.
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("needs git and a checkout to know which files belong to the package")
    for name in listed.stdout.splitlines():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_the_kernels_and_only_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"fastrlhf/kernels/{name}" for name in KERNEL_FILES} <= set(names)
    assert "fastrlhf/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastrlhf", wheel.name.rsplit("-py3", 1)[0] + ".dist-info"}


def metadata(built: Path) -> Message:
    """The metadata of the wheel, as an index reads it."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def test_the_sdist_holds_what_a_wheel_is_built_from_and_says_what_it_is(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"fastrlhf/kernels/{name}" for name in KERNEL_FILES} <= names
    texts = {
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "README.md",
        "SECURITY.md",
    }
    assert texts <= names
    # Tests need a checkout, so that part of them would be worse than none.
    assert not [name for name in names if name.startswith(("tests", "kernels"))]
    of_benchmarks = [name for name in names if name.startswith("benchmarks/")]
    assert all(f"{name}/".startswith("benchmarks/results/") for name in of_benchmarks)


def test_the_sdist_holds_what_the_pages_of_the_manual_show(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert {str(page.relative_to(ROOT)) for page in pages} <= names
    shown = set()
    for page in pages:
        text = page.read_text("utf-8")
        links = re.findall(
            r"!\[[^]]*\]\(([^)]+)\)|^```\{(?:literal)?include\} (\S+)", text, flags=re.M
        )
        for link in ("".join(found) for found in links):
            shown.add(os.path.relpath(page.parent / link, ROOT))
    assert len(shown) > 15
    assert shown <= names


def test_the_wheel_has_the_license(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    folder = wheel.name.rsplit("-py3", 1)[0] + ".dist-info"
    text = zipfile.ZipFile(wheel).read(f"{folder}/licenses/LICENSE")
    assert text == (ROOT / "LICENSE").read_bytes() and b"Apache License" in text


def test_an_index_takes_the_metadata(built: Path) -> None:
    files = [str(path) for path in [*built.glob("*.whl"), *built.glob("*.tar.gz")]]
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = metadata(built)
    assert found["Version"] == fastrlhf.__version__
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in found.get_all("Classifier")


def test_the_description_that_an_index_shows_has_no_link_into_the_repository(built: Path) -> None:
    text = metadata(built).get_payload()
    assert text.startswith("# fastrlhf")
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert not [target for target in targets if not target.startswith("https://")]


def test_the_examples_that_an_index_shows_run() -> None:
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "PYPI.md").read_text(), flags=re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert names["logits"].grad.shape == (4, 16, 1000) and names["losses"].shape == (2,)


@pytest.fixture(scope="module")
def environments(built: Path, tmp_path_factory) -> dict[str, Path]:
    """The interpreters of two fresh environments, with the wheel in one and the sdist in the other.

    They see torch and what it needs where this interpreter has them, but not this tree: the file
    that makes an editable installation importable is not read from there.
    """
    interpreters = {}
    for kind, pattern in (("wheel", "*.whl"), ("sdist", "*.tar.gz")):
        (file,) = built.glob(pattern)
        folder = tmp_path_factory.mktemp(kind)
        venv.create(folder, symlinks=True)
        interpreters[kind] = folder / "bin" / "python"
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "here.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
        pip = [sys.executable, "-m", "pip", "--python", str(interpreters[kind]), "install"]
        offline = ["--no-index", "--no-deps", "--no-build-isolation", "--force-reinstall"]
        done = subprocess.run([*pip, *offline, str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return interpreters


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_installed_in_a_fresh_environment_works_and_has_what_it_requires(
    environments: dict[str, Path], kind: str
) -> None:
    python = environments[kind]
    code = """
import torch, fastrlhf, fastrlhf.recipes, fastrlhf.integrations
from importlib import metadata
from packaging.requirements import Requirement

logits = torch.randn(2, 3, 50, requires_grad=True)
stats = fastrlhf.token_stats(logits, torch.zeros(2, 3, dtype=torch.long), entropy=True)
(stats.logprob.sum() + stats.entropy.sum()).backward()
assert logits.grad.isfinite().all()

for line in metadata.requires("fastrlhf"):
    needed = Requirement(line)
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        assert needed.specifier.contains(metadata.version(needed.name)), line
print(fastrlhf.__file__)
print(fastrlhf.__version__, metadata.version("fastrlhf"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    where, version, installed = done.stdout.split()
    assert Path(where).is_relative_to(python.parent.parent), where
    assert version == installed == fastrlhf.__version__


def test_a_type_checker_finds_the_types_of_the_installed_wheel(
    environments: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("mypy")
    user = tmp_path / "user.py"
    user.write_text((ROOT / "tests" / "support" / "typed_user.py").read_text())
    command = [
        sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context",
        "--config-file=", f"--cache-dir={tmp_path / 'cache'}",
        f"--python-executable={environments['wheel']}", user.name,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert not done.stderr, done.stderr
    found = re.findall(r"^user\.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, flags=re.M)
    expected = [
        (str(number), match[1])
        for number, line in enumerate(user.read_text().splitlines(), 1)
        if (match := re.search(r"  # error: ([a-z-]+)$", line))
    ]
    assert len(expected) >= 12
    assert sorted(set(found)) == sorted(expected), done.stdout
    others = [line for line in done.stdout.splitlines() if not line.startswith("user.py:")]
    assert not others  # nothing of the package itself is complained of


def test_the_citation_is_that_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {
        "cff-version",
        "message",
        "title",
        "authors",
    } <= citation.keys()  # what the format wants
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"].startswith("fastrlhf")
    assert citation["authors"] == [{"name": "The fastrlhf authors"}]
    assert citation["license"] == "Apache-2.0"
    assert citation["version"] == fastrlhf.__version__
    date.fromisoformat(citation["date-released"])


def test_the_changelog_begins_with_this_version_of_the_day_of_the_citation() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[0] == f"{fastrlhf.__version__} - {citation['date-released']}"


def test_the_security_policy_is_about_this_version() -> None:
    minor = fastrlhf.__version__.rsplit(".", 1)[0]
    assert f"| {minor}.x | yes |" in (ROOT / "SECURITY.md").read_text()


def test_the_installed_wheel_works_without_triton_and_transformers(
    built: Path, tmp_path: Path
) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    out = run_python(
        """
import torch, fastrlhf
logits = torch.randn(3, 5, requires_grad=True)
logprobs = fastrlhf.token_logprobs(logits, torch.tensor([0, 4, -100]))
index = torch.tensor([0]), torch.tensor([1])
losses, _ = fastrlhf.dpo_loss(logprobs, torch.zeros(3), *index)
losses.sum().backward()
print(fastrlhf.__file__, logits.grad[2].abs().sum().item())
""",
        path=tmp_path,
        blocked=("triton", "transformers", "peft"),
    )
    assert out == f"{tmp_path}/fastrlhf/__init__.py 0.0"


def test_asking_for_triton_without_it_says_what_is_missing() -> None:
    out = run_python(
        """
import torch, fastrlhf
try:
    fastrlhf.token_logprobs(torch.randn(3, 5), torch.tensor([0, 4, 1]), impl="triton")
except ValueError as error:
    print(error)
""",
        path=ROOT,
        blocked=("triton",),
    )
    assert out.startswith("impl:") and "not installed" in out


def test_triton_on_the_cpu_without_its_interpreter_says_how_to_turn_it_on() -> None:
    out = run_python(
        """
import torch, fastrlhf
try:
    fastrlhf.token_logprobs(torch.randn(3, 5), torch.tensor([0, 4, 1]), impl="triton")
except ValueError as error:
    print(error)
""",
        path=ROOT,
    )
    assert out.startswith("impl:") and "TRITON_INTERPRET=1" in out


def test_import_loads_no_triton_and_no_optional_package() -> None:
    optional = ["triton", "transformers", "peft", "bitsandbytes", "trl", "matplotlib", "numpy.f2py"]
    out = run_python(
        f"import sys, fastrlhf; print([name for name in {optional} if name in sys.modules])",
        path=ROOT,
    )
    assert out == "[]"


def test_kernels_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "fastrlhf" / "kernels") == "../kernels"


def test_a_real_package_called_kernels_wins_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("NAME = 'the other one'\n")
    out = run_python(
        "import kernels, fastrlhf.kernels; print(kernels.NAME)", path=f"{ROOT}:{tmp_path}"
    )
    assert out == "the other one"


def test_the_root_is_not_importable_in_the_tests() -> None:
    assert str(ROOT) not in [str(Path(entry or ".").resolve()) for entry in sys.path]
