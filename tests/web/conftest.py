"""One server for the browser tests, with tiny models under the names that the example workflows ask for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host")]

#: file of the models folder -> the tiny model behind it.
MODELS = {
    "diffusion_models/v1-5-pruned-emaonly-fp16.safetensors": "sd15",
    "diffusion_models/sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors": "sd3",
    "diffusion_models/flux1-dev.safetensors": "flux",
    "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors": "wan",
    "controlnet/control_v11p_sd15_canny_fp16.safetensors": "control",
}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    import conftest_host  # noqa: F401  (makes the host importable: the tiny models are built of its own modules)
    import tiny
    from comfy_server import Server
    from safetensors.torch import save_file

    base = tmp_path_factory.mktemp("comfyui")
    running = Server(base)
    for name, kind in MODELS.items():
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = "control_model." if kind == "control" else ""
        save_file({prefix + k: v for k, v in tiny.state_dict(kind).items()}, str(path))
    (base / "custom_nodes" / "TinyPack").symlink_to(HERE / "tiny_pack", target_is_directory=True)
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def browser():
    from browser import chromium_driven

    with chromium_driven() as driven:
        yield driven


@pytest.fixture(scope="session")
def page(server, browser):
    from browser import tab

    with tab(browser, server.port) as opened:
        yield opened


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "vue"])
def mode(request, server, browser):
    """``(page, faults, name)`` in each of the frontend's two ways to draw nodes."""
    from watching import opened

    with opened(server, browser, request.param) as (page, faults):
        yield page, faults, "vue" if request.param else "classic"
