"""Makes the real ComfyUI importable and the pack loaded as the host loads it: a package from a folder.

The host runs on the CPU, unless ``PARATAFUSION_HOST_ARGS`` gives it other options of its own: with ``--fp32-unet`` the
tests that need no server run on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACK = "paratafusion_pack"


def _start_host() -> None:
    host = os.environ.get("COMFYUI_PATH")
    if not host:
        raise pytest.UsageError("COMFYUI_PATH is not set; run these tests with: python tests/host/bootstrap.py test")
    # the repository's own `nodes` folder must not hide the host's nodes.py
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != REPOSITORY]
    sys.path[:0] = [str(Path(host).resolve()), str(Path(__file__).parent)]
    from comfy.cli_args import args, parser

    parser.parse_args(shlex.split(os.environ.get("PARATAFUSION_HOST_ARGS", "--cpu")), namespace=args)
    if args.fp32_unet:
        import torch

        # on by default on NVIDIA's cards, where a batch then differs from its rows by 1e-3
        torch.backends.cudnn.allow_tf32 = False


def _load_pack() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        PACK, REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return module


_start_host()
_load_pack()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running ComfyUI with the pack, for the tests of one file."""
    from comfy_server import Server

    running = Server(tmp_path_factory.mktemp("comfyui"))
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def flow_model():
    """The tiny SD3: a flow model."""
    from tiny import load

    return load("sd3")


@pytest.fixture(scope="session")
def eps_model(flow_model):
    """The tiny SD3 read as an eps-predicting model, by the host's own node."""
    from tiny import as_prediction

    return as_prediction(flow_model, "eps")


@pytest.fixture(scope="session")
def ztsnr_model(flow_model):
    """The tiny SD3 read as a v-predicting model with zero terminal SNR."""
    from tiny import as_prediction

    return as_prediction(flow_model, "v_prediction", zsnr=True)


@pytest.fixture
def fresh(monkeypatch):
    """What is known of models, of this test's own."""
    from paratafusion_pack.nodes.host import latency, sampler

    cache = latency.Latencies()
    monkeypatch.setattr(sampler, "KNOWN", cache)
    return cache


@pytest.fixture
def machine(monkeypatch):
    """Sets what a call of ``model`` for so many pictures takes, on a clock that its network alone moves."""
    from paratafusion_pack.nodes.host.latency import Known

    def takes(model, seconds):
        network, now = model.model.diffusion_model, [0.0]
        forward, known = network.forward, Known.machine

        def ticking(x, *args, **kwargs):
            now[0] += seconds(x.shape[0])
            return forward(x, *args, **kwargs)

        monkeypatch.setattr(network, "forward", ticking)
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(Known, "machine", lambda self, most=None: replace(known(self, most), clock=lambda: now[0]))

    return takes
