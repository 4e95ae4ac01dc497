"""The package as users get it: wheel, sdist, bare imports, and a kernels/ folder that shadows
nobody.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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


def test_the_sdist_holds_the_kernels_and_the_license(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"fastrlhf/kernels/{name}" for name in KERNEL_FILES} <= names
    assert "LICENSE" in names


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
