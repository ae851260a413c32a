"""Trajectories between runs: in files, and under a name in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..paratafusion_core import Trajectory, load_trajectory, save_trajectory
from .host.graph import problem_of, running_prompt
from .host.listing import Listing
from .host.names import check_name, check_path
from .host.notify import say_on_node
from .host.store import STORE, Entry
from .types import CATEGORY, TrajectoryType, schema

_HIDDEN = [io.Hidden.prompt, io.Hidden.unique_id]
_NAME_TIP = "The name under which Keep Trajectory and Recall Trajectory meet."
_OUTPUT_MARK = " [output]"
_ALLOWED = "a safetensors file inside the input or output folder is allowed"
_NOTHING_TO_SAVE = (
    "nothing to save: the trajectory is empty, as after a sequential run (its report says why) or one without steps"
)
_LISTING = Listing(".safetensors")


def _client() -> str:
    """The browser that has queued the running graph: two people do not share trajectories."""
    instance = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    return str(getattr(instance, "client_id", None) or "")


def _described(trajectory: Trajectory) -> str:
    kind = "" if trajectory.latent is None else f" {trajectory.latent}"
    sketch = "" if trajectory.part is None else f", a sketch with {trajectory.part.final} final"
    return (
        f"{trajectory.sampler}, {len(trajectory.sigmas)} evaluations{sketch}, "
        f"{list(trajectory.shape)}{kind}, {_size(trajectory)}"
    )


def _size(trajectory: Trajectory) -> str:
    return f"{trajectory.nbytes / 1e6:.1f} MB"


def _verdict(check: Callable[[str, str], str], label: str, value: str | None) -> bool | str:
    """What the host is told of an input before the graph runs; a linked one is checked when it arrives."""
    try:
        return True if value is None else bool(check(label, value))
    except ValueError as error:
        return str(error)


class SaveTrajectory(io.ComfyNode):
    """Writes a trajectory to the host's output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_SaveTrajectory",
            display_name="Save Trajectory",
            category=CATEGORY,
            description="Saves a trajectory as a safetensors file in the output folder.",
            search_aliases=["warm start", "export trajectory", "safetensors"],
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
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return _verdict(check_path, "filename_prefix", filename_prefix)

    @classmethod
    def execute(cls, trajectory: Trajectory | None, filename_prefix: str) -> io.NodeOutput:
        if trajectory is None:  # no error: it would end the run, maybe before its picture is saved
            say_on_node(_NOTHING_TO_SAVE)
            return io.NodeOutput()
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            check_path("filename_prefix", filename_prefix), folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_.safetensors"
        try:
            save_trajectory(Path(folder) / file, trajectory)
        except ValueError as error:  # too large
            say_on_node(f"not saved: {error}")
            return io.NodeOutput()
        kind = "" if trajectory.part is None else ", a sketch"
        # the path first, and few words behind it: a node shows about two lines
        say_on_node(f"saved {Path(subfolder, file).as_posix()}: {trajectory.sampler}{kind}, {_size(trajectory)}")
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
            search_aliases=["warm start", "import trajectory", "safetensors"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_files(),
                    tooltip="A safetensors file of Save Trajectory in the input or the output folder.",
                )
            ],
            outputs=[
                TrajectoryType.Output(
                    display_name="trajectory", tooltip="For the trajectory input of a parallel sampler."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        if file is None:  # it is linked, and known only when the node runs
            return True
        try:
            path = _resolved(file)
        except ValueError as error:
            return str(error)
        return True if path.is_file() else f"file is {file!r}, which is not in the input or output folder"

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> Any:
        # linked, any name may arrive: the same as long as no file has changed
        return [_changed(name) for name in ([file] if file is not None else _files())]

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        trajectory = load_trajectory(_resolved(file))
        say_on_node(_described(trajectory))
        return io.NodeOutput(trajectory)


def _files() -> list[str]:
    """Trajectory files of the input folder, then of the output folder; of those with names that Load takes."""
    found: list[str] = []
    for root, mark in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), _OUTPUT_MARK)):
        found += [name + mark for name in _LISTING.of(Path(root)) if _verdict(check_path, "file", name) is True]
    return found


def _changed(file: str) -> list[Any]:
    """What changes with a file of the listing."""
    try:
        stat = _resolved(file).stat()
    except (OSError, ValueError):
        return [file, None]
    return [file, stat.st_mtime_ns, stat.st_size]


def _resolved(file: str) -> Path:
    """The path of a listed file.

    Raises:
        ValueError: it is no text, no path that every system takes, or leads out of the host's folders, by a link as
            well.
    """
    if not isinstance(file, str):  # the host lets anything through a link to a list
        raise ValueError(f"file is {file!r}; {_ALLOWED}")
    own = file.endswith(_OUTPUT_MARK)
    base = Path(folder_paths.get_output_directory() if own else folder_paths.get_input_directory()).resolve()
    path = (base / check_path("file", file.removesuffix(_OUTPUT_MARK))).resolve()
    if not path.is_relative_to(base) or path.suffix != ".safetensors":
        raise ValueError(f"file is {file!r}; {_ALLOWED}")
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
            search_aliases=["warm start", "remember", "store trajectory"],
            is_output_node=True,
            hidden=_HIDDEN,
            inputs=[
                TrajectoryType.Input("trajectory", tooltip="From a parallel sampler."),
                io.String.Input("name", default="default", tooltip=_NAME_TIP),
            ],
            outputs=[TrajectoryType.Output(display_name="trajectory", tooltip="The same trajectory.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return _verdict(check_name, "name", name)

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, **_: Any) -> Any:
        # the host's cache serves all clients and forgets later than the store: who has lost it keeps it again
        client, problem = _client(), problem_of(running_prompt(), cls.hidden.unique_id)
        return [client, STORE.last_loss(client, name, problem)]

    @classmethod
    def execute(cls, trajectory: Trajectory | None, name: str) -> io.NodeOutput:
        key = (_client(), check_name("name", name))
        if trajectory is None:
            say_on_node("nothing to keep: the sampler ran sequentially, or had no steps to run")
            return io.NodeOutput(None)
        try:
            gone = STORE.keep(key, Entry(trajectory, problem_of(cls.hidden.prompt, cls.hidden.unique_id)))
        except ValueError as error:  # too large
            say_on_node(f"not kept: {error}")
            return io.NodeOutput(trajectory)
        said = f"kept {name!r}: {_described(trajectory)}"
        if gone:
            names = ", ".join(repr(n) if client == key[0] else "another browser's" for client, n in gone)
            said += f"; dropped {names}, not used for longest ({STORE.bounds} are kept)"
        say_on_node(said)
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
            search_aliases=["warm start", "remember", "last run"],
            inputs=[io.String.Input("name", default="default", tooltip=_NAME_TIP)],
            outputs=[
                TrajectoryType.Output(
                    display_name="trajectory", tooltip="For the trajectory input of a parallel sampler; may be empty."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return _verdict(check_name, "name", name)

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None) -> Any:
        # the problem, never the numbers: re-queueing an unchanged graph comes to rest
        if name is None:  # linked: any name may arrive
            return STORE.problems(_client())
        entry = STORE.recall((_client(), name))
        return entry.problem if entry else "empty"

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        entry = STORE.recall((_client(), check_name("name", name)))
        said = f"nothing kept as {name!r} yet: a cold start"
        say_on_node(said if entry is None else f"recalled {name!r}: {_described(entry.trajectory)}")
        return io.NodeOutput(entry.trajectory if entry else None)
