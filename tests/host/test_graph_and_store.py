"""What nodes read off the graph, and the store behind Keep and Recall."""

from __future__ import annotations

import math

import pytest
import torch
from paratafusion_pack.nodes.host.graph import UNKNOWN, is_linked, problem_of
from paratafusion_pack.nodes.host.settings import PRESETS, SOLVERS, Settings
from paratafusion_pack.nodes.host.store import Entry, Store
from paratafusion_pack.nodes.options import ParallelOptions
from paratafusion_pack.nodes.trajectories import _resolved
from paratafusion_pack.paratafusion_core import Trajectory

GRAPH = {
    "1": {"class_type": "Model", "inputs": {"name": "a"}},
    "2": {"class_type": "Sampler", "inputs": {"model": ["1", 0], "seed": 3}},
    "3": {"class_type": "Keep", "inputs": {"trajectory": ["2", 1]}},
    "4": {"class_type": "Other", "inputs": {"text": "x"}},
}


def changed(node: str, **inputs: object) -> dict:
    return {**GRAPH, node: {**GRAPH[node], "inputs": {**GRAPH[node]["inputs"], **inputs}}}


def test_links():
    assert is_linked(GRAPH, "2", 1) and not is_linked(GRAPH, "2", 0)
    assert is_linked(None, "2", 0) and is_linked(GRAPH, "7", 0)  # unknown graphs and nodes get everything


def test_a_problem_is_what_lies_upstream():
    same = problem_of(GRAPH, "3")
    assert problem_of(dict(GRAPH), "3") == same
    assert problem_of(changed("4", text="y"), "3") == same
    assert problem_of(changed("1", name="b"), "3") != same
    assert problem_of(changed("2", seed=4), "3") != same
    assert problem_of(changed("3", options="y"), "3", without=("options",)) == same
    assert problem_of(changed("3", options="y"), "3") != same
    other = {**GRAPH, "9": GRAPH["3"]}
    assert problem_of(other, "9") == same  # another node with the same inputs
    assert problem_of(GRAPH, "8") == problem_of(None, "3") == UNKNOWN
    loop = changed("1", name=["3", 0])
    assert problem_of(loop, "3") != same  # and it ends


def entry(size: int) -> Entry:
    return Entry(Trajectory(torch.zeros(size, 1, 1, dtype=torch.float16), torch.ones(size)), "p")


def test_the_store_is_bounded_by_count_and_bytes():
    store = Store(entries=2, max_bytes=100)
    dropped = [store.keep(("me", name), entry(4)) for name in "abc"]
    assert dropped == [[], [], [("me", "a")]]
    assert store.recall(("me", "a")) is None and store.recall(("me", "b")) is not None
    store.keep(("me", "d"), entry(4))  # c was used less recently than b
    assert store.recall(("me", "c")) is None and store.recall(("me", "b")) is not None
    store.keep(("me", "big"), entry(46))
    assert store.recall(("me", "d")) is None and store.recall(("me", "b")) is not None  # 100 bytes of 100
    assert store.keep(("me", "big"), entry(47)) == [("me", "b")]
    assert store.recall(("me", "b")) is None and store.recall(("me", "big")) is not None
    assert store.recall(("you", "big")) is None
    with pytest.raises(ValueError, match="at most 100"):
        store.keep(("me", "huge"), entry(51))
    assert store.recall(("me", "big")) is not None


def test_a_loss_has_a_number_until_the_next_one():
    """The fingerprint of Keep: it changes when something goes, and not when it is kept again."""
    store, me = Store(entries=1), ("me", "a")

    def kept(key: tuple[str, str], problem: str) -> int:
        store.keep(key, Entry(entry(4).trajectory, problem))
        return store.last_loss("me", "a", "p")

    assert [kept(me, "p"), kept(me, "p")] == [0, 0]
    replaced = kept(me, "q")
    assert replaced > 0 and kept(me, "p") == replaced
    dropped = kept(("you", "b"), "p")
    assert dropped > replaced and kept(me, "p") == dropped
    assert store.last_loss("me", None, "p") == dropped and store.last_loss("me", "other", "p") == 0


def test_entries_of_an_unknown_problem_differ():
    """Recall goes by the problem: it would take the second for the first, and give that from the cache."""
    store, known = Store(), Entry(entry(4).trajectory, UNKNOWN)
    problems = []
    for _ in range(2):
        store.keep(("me", "a"), known)
        problems.append(store.recall(("me", "a")).problem)
    assert len(set(problems)) == 2 and store.recall(("me", "a")).trajectory is known.trajectory


def chosen(**asked: object) -> Settings:
    defaults = {i.id: i.default for i in ParallelOptions.define_schema().inputs}
    return ParallelOptions.execute(**{**defaults, **asked}).args[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_options_name_a_number_that_is_none_by_its_input(value):
    with pytest.raises(ValueError, match=f"^tolerance is {value}; a finite number of at least 0 is allowed$"):
        chosen(preset="custom", tolerance=value)
    assert chosen(tolerance=value).tol is None  # ignored
    with pytest.raises(ValueError, match=f"^target_db is {value}; a finite number of at least 0 is allowed$"):
        chosen(target_db=value)


def test_one_row_is_taken_as_two():
    """The widget lets it through, and the engine takes no fewer."""
    assert [chosen(rows=rows).rows for rows in (0, 1, 2, 3)] == [None, 2, 2, 3]
    assert chosen(rows=1, solver="collocation").options(False, 1.0).rows == 2


def test_an_options_node_left_alone_is_no_options_node():
    assert chosen() == Settings()


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "sequential"])
@pytest.mark.parametrize("preset", [*PRESETS, "custom"])
def test_every_choice_is_one_the_engine_takes(solver, preset):
    options = chosen(solver=solver, preset=preset, tolerance=0.5, target_db=40.0, rows=9).options(False, 1.0)
    assert (options.tolerance == 0.5) == (preset == "custom")


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        ("../x.safetensors", "steps out of its folder"),
        ("/etc/passwd", "absolute"),
        ("a.txt", "inside the input or output folder"),
        ("../../output/x.safetensors [output]", "steps out of its folder"),
    ],
)
def test_only_files_of_the_hosts_folders(file, fault):
    with pytest.raises(ValueError, match=fault):
        _resolved(file)
