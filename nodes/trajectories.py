"""Trajectories between runs: in files, and under a name in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..paratafusion_core import Trajectory, load_trajectory, save_trajectory
from .host.graph import problem_of
from .host.notify import say_on_node
from .host.store import STORE, Entry
from .types import CATEGORY, TrajectoryType, schema

_HIDDEN = [io.Hidden.prompt, io.Hidden.unique_id]
_NAME_TIP = "The name under which Keep Trajectory and Recall Trajectory meet."
_OUTPUT_MARK = " [output]"


def _client() -> str:
    """The browser that has queued the running graph: two people do not share trajectories."""
    instance = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    return str(getattr(instance, "client_id", None) or "")


def _present(trajectory: Trajectory | None) -> Trajectory:
    if trajectory is None:
        raise ValueError(
            "trajectory is empty: its sampler ran before this output was linked, or ran sequentially; "
            "change its seed to run it again"
        )
    return trajectory


def _described(trajectory: Trajectory) -> str:
    return f"{trajectory.sampler}, {len(trajectory.sigmas)} evaluations, {list(trajectory.shape)}"


class SaveTrajectory(io.ComfyNode):
    """Writes a trajectory to the host's output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_SaveTrajectory",
            display_name="Save Trajectory",
            category=CATEGORY,
            description="Saves a trajectory as a safetensors file in the output folder.",
            is_output_node=True,
            inputs=[
                TrajectoryType.Input("trajectory", tooltip="From a parallel sampler."),
                io.String.Input(
                    "filename_prefix",
                    default="trajectories/ParaTAF",
                    tooltip="File name inside the output folder; a counter is added. Folders are allowed.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, trajectory: Trajectory | None, filename_prefix: str) -> io.NodeOutput:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_.safetensors"
        save_trajectory(Path(folder) / file, _present(trajectory))
        say_on_node(f"saved {file}")
        return io.NodeOutput(ui={"files": [{"filename": file, "subfolder": subfolder, "type": "output"}]})


class LoadTrajectory(io.ComfyNode):
    """Reads a trajectory from the host's input or output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_LoadTrajectory",
            display_name="Load Trajectory",
            category=CATEGORY,
            description="Loads a trajectory of Save Trajectory, for a warm start.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_files(),
                    tooltip="A safetensors file of Save Trajectory in the input or the output folder.",
                )
            ],
            outputs=[TrajectoryType.Output(display_name="trajectory")],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        try:
            path = _resolved(file)
        except ValueError as error:
            return str(error)
        return True if path.is_file() else f"file is {file!r}, which is not in the input or output folder"

    @classmethod
    def fingerprint_inputs(cls, file: str) -> Any:
        stat = _resolved(file).stat()
        return [stat.st_mtime_ns, stat.st_size]

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        trajectory = load_trajectory(_resolved(file))
        say_on_node(_described(trajectory))
        return io.NodeOutput(trajectory)


def _files() -> list[str]:
    """Trajectory files of the input folder, then of the output folder."""
    found: list[str] = []
    for root, mark in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), _OUTPUT_MARK)):
        base = Path(root)
        if base.is_dir():
            inside = (p.relative_to(base).as_posix() for p in base.rglob("*.safetensors") if p.is_file())
            found += sorted(name + mark for name in inside)
    return found


def _resolved(file: str) -> Path:
    """The path of a listed file.

    Raises:
        ValueError: it leads out of the host's folders.
    """
    own = file.endswith(_OUTPUT_MARK)
    base = Path(folder_paths.get_output_directory() if own else folder_paths.get_input_directory()).resolve()
    path = (base / file.removesuffix(_OUTPUT_MARK)).resolve()
    if not path.is_relative_to(base) or path.suffix != ".safetensors":
        raise ValueError(f"file is {file!r}; a safetensors file inside the input or output folder is allowed")
    return path


class KeepTrajectory(io.ComfyNode):
    """Keeps a trajectory in memory for the next run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_KeepTrajectory",
            display_name="Keep Trajectory",
            category=CATEGORY,
            description="Keeps a trajectory in memory under a name, for Recall Trajectory in the next run.",
            is_output_node=True,
            hidden=_HIDDEN,
            inputs=[
                TrajectoryType.Input("trajectory", tooltip="From a parallel sampler."),
                io.String.Input("name", default="default", tooltip=_NAME_TIP),
            ],
            outputs=[TrajectoryType.Output(display_name="trajectory", tooltip="The same trajectory.")],
        )

    @classmethod
    def execute(cls, trajectory: Trajectory | None, name: str) -> io.NodeOutput:
        if trajectory is None:
            say_on_node("nothing to keep: the sampler ran sequentially, or before this node was linked")
            return io.NodeOutput(None)
        entry = Entry(trajectory, problem_of(cls.hidden.prompt, cls.hidden.unique_id))
        STORE.keep((_client(), name), entry)
        say_on_node(f"kept {name!r}: {_described(trajectory)}, {entry.size / 1e6:.1f} MB")
        return io.NodeOutput(trajectory)


class RecallTrajectory(io.ComfyNode):
    """Gives back what Keep Trajectory has kept in an earlier run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_RecallTrajectory",
            display_name="Recall Trajectory",
            category=CATEGORY,
            description="The trajectory kept under a name by an earlier run; empty at first, which is a cold start.",
            inputs=[io.String.Input("name", default="default", tooltip=_NAME_TIP)],
            outputs=[TrajectoryType.Output(display_name="trajectory")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> Any:
        # the problem, never the numbers: re-queueing an unchanged graph comes to rest
        entry = STORE.recall((_client(), name))
        return entry.problem if entry else "empty"

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        entry = STORE.recall((_client(), name))
        say_on_node(f"recalled {_described(entry.trajectory)}" if entry else f"nothing kept as {name!r} yet")
        return io.NodeOutput(entry.trajectory if entry else None)
