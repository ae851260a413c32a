"""What the ComfyUI registry and packagers read: pyproject.toml, icon and banner, .comfyignore, size, changelog."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
#: What the registry's own tool knows; it drops all of them where it meets another.
ACCELERATORS = {
    "GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "NPU :: Huawei Ascend", "GPU :: Apple Metal",
}  # fmt: skip
LARGEST_REPOSITORY = 15_000_000
#: Folders and files that a running ComfyUI needs of this pack.
NEEDED = (
    "__init__.py", "nodes/extension.py", "paratafusion_core/__init__.py", "paratafusion_core/demo/demo.safetensors",
    "web/assets/convergence.png", "web/docs/ParaTAF_KSampler.md", "locales/ja/nodeDefs.json",
    "example_workflows/quickstart.json", "example_workflows/quickstart.jpg", "pyproject.toml", "LICENSE", "README.md",
)  # fmt: skip


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def ignored(path: str) -> bool:
    """Whether ``.comfyignore`` leaves a file out; plain names, and folders with a slash behind, are all it uses."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return any(path.startswith(p) if p.endswith("/") else fnmatch(path, p) for p in patterns)


def shipped() -> list[str]:
    """Files that the registry's archive holds: what git would track, less what is ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for path in listed.stdout.splitlines() if not ignored(path)]


def test_project_fields(config):
    project = config["project"]
    assert re.fullmatch(r"[a-z][a-z0-9]*(?:[-_.][a-z0-9]+)*", project["name"]) and len(project["name"]) < 100
    assert "comfy" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == {"file": "LICENSE"} and (ROOT / "LICENSE").is_file()
    assert project["description"] and project["requires-python"] == ">=3.10"
    assert all(url.startswith("https://") for url in project["urls"].values())
    assert {"Repository", "Documentation", "Bug Tracker"} <= set(project["urls"])
    assert set(project["dependencies"]) == {"numpy", "safetensors", "pillow", "tqdm"}  # no more than the host brings


def test_classifiers_are_read(config):
    classifiers = config["project"]["classifiers"]
    assert "Operating System :: OS Independent" in classifiers
    accelerators = {c.removeprefix("Environment :: ") for c in classifiers if c.startswith("Environment :: ")}
    assert "GPU :: NVIDIA CUDA" in accelerators and accelerators <= ACCELERATORS


def test_comfy_table(config):
    comfy = config["tool"]["comfy"]
    assert comfy["DisplayName"] and re.fullmatch(r"[A-Za-z0-9-]+", comfy["PublisherId"])
    assert re.fullmatch(r">=\d+\.\d+\.\d+(,<\d+\.\d+\.\d+)?", comfy["requires-comfyui"])
    assert all((ROOT / folder).exists() for folder in comfy["includes"])
    assert "web" not in comfy  # the host would serve and load the folder twice


def test_icon_and_banner_are_files_of_the_repository(config):
    comfy, repository = config["tool"]["comfy"], config["project"]["urls"]["Repository"]
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    for key in ("Icon", "Banner"):
        assert comfy[key].startswith(raw)
        assert (ROOT / comfy[key].removeprefix(raw)).is_file()
    assert repository.split("/")[3] == comfy["PublisherId"]  # both are the same placeholder, or the same owner


def drawings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_assets", ROOT / "tests" / "web" / "draw_assets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["icon", "banner"])
def test_drawn_pictures(name):
    with Image.open(ROOT / "web" / "assets" / f"{name}.png") as picture:
        wide, high = picture.size
        stored = picture.convert("RGB")
    if name == "icon":
        assert wide == high <= 400
    else:
        assert wide * 9 == high * 21
    drawn = getattr(drawings(), name)()
    assert drawn.size == stored.size
    # fonts and the reduction to a palette differ a little between versions of Pillow
    assert sum(ImageStat.Stat(ImageChops.difference(drawn, stored)).mean) / 3 < 2


def test_the_archive_holds_what_the_host_needs():
    files = shipped()
    assert not [path for path in NEEDED if path not in files]
    assert {path.split("/")[0] for path in files} == {
        "__init__.py", "nodes", "paratafusion_core", "web", "locales", "example_workflows",
        "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md",
    }  # fmt: skip
    assert sum((ROOT / path).stat().st_size for path in files if (ROOT / path).exists()) < LARGEST_REPOSITORY / 2


def test_the_repository_is_small():
    counted = subprocess.run(["git", "count-objects", "-v"], cwd=ROOT, capture_output=True, text=True, check=False)
    if counted.returncode != 0:
        pytest.skip("not a git checkout")
    sizes = dict(line.split(": ") for line in counted.stdout.splitlines())
    assert (int(sizes["size"]) + int(sizes["size-pack"])) * 1024 < LARGEST_REPOSITORY


def test_the_changelog_has_this_version(config):
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", text, re.MULTILINE)
    assert released[0] == config["project"]["version"]
    assert released == sorted(set(released), key=lambda v: [int(n) for n in v.split(".")], reverse=True)


@pytest.mark.parametrize("file", ["README.md", "paratafusion_core/bench/RESULTS.md"])
def test_what_a_document_points_to_is_there(file: str):
    text = (ROOT / file).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", text) if not t.startswith("https://")]
    headings = {f"#{h.lower().replace(' ', '-')}" for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert targets
    assert not [t for t in targets if t not in headings and not ((ROOT / file).parent / t).is_file()]


def test_the_publish_workflow_names_a_secret_and_no_token():
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert "personal_access_token: ${{ secrets.REGISTRY_ACCESS_TOKEN }}" in text
    assert "workflow_dispatch" in text
