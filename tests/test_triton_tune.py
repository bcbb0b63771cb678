"""The tuner of the Triton backend: what it remembers, and what it does with a damaged memory."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from fastalex.kernels import _tune
from fastalex.kernels._configs import ConvTile, Launch

SLOW, FAST, WRONG, BROKEN = (Launch(64 * i, i) for i in range(1, 5))
TIMES = {SLOW: 2.0, FAST: 1.0, WRONG: 0.5}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALEX_CACHE_DIR", str(tmp_path))
    _tune.memory.cache_clear()
    yield tmp_path
    _tune.memory.cache_clear()


def operator(x, scale, launch):
    operator.ran = launch
    if launch == BROKEN:
        raise RuntimeError("out of resource: shared memory")
    return x * scale + (1 if launch == WRONG else 0)


def run_tune(x, stock=None):
    def time(run):
        if run is stock:
            return run()
        run()
        return TIMES[operator.ran]

    def agrees(y):
        return torch.equal(y, x * 2)

    return _tune.tune(operator, "launch", (x, 2), (SLOW, FAST, WRONG, BROKEN), agrees, stock, time)


def test_the_fastest_right_candidate_is_remembered_across_processes():
    x = torch.ones(2, 3)
    trials = run_tune(x)
    assert [t.milliseconds for t in trials] == [2.0, 1.0, None, None]
    assert "differs" in trials[2].refusal
    assert "shared memory" in trials[3].refusal
    _tune.memory.cache_clear()
    assert _tune.remembered("operator", "launch", (x, 2)) == FAST
    assert _tune.remembered("operator", "launch", (x, 3)) is None
    assert _tune.remembered("operator", "launch", (x.t(), 2)) is None
    assert _tune.remembered("operator", "launch", (x.half(), 2)) is None


def test_only_a_candidate_faster_than_stock_is_remembered():
    x = torch.ones(1)
    run_tune(x, stock=lambda: 1.5)
    assert _tune.remembered("operator", "launch", (x, 2)) == FAST
    run_tune(x, stock=lambda: 0.9)
    for _ in range(2):  # in this process, then from the file
        assert _tune.remembered("operator", "launch", (x, 2)) is None
        _tune.memory.cache_clear()


def test_entries_of_other_processes_are_kept(folder):
    theirs = {"theirs": ConvTile(128, 64, 32, 32, 8, 3, 2)}
    _tune.memory()
    _tune.save(_tune.cache_file(), theirs)
    run_tune(torch.ones(1))
    assert theirs.items() <= _tune.load(_tune.cache_file()).items()
    assert [path.name for path in folder.iterdir()] == ["triton.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 1, "entries": {"a": ["Launch", {"threads": 1}]}}',
        '{"version": 1, "entries": {"a": ["os.system", {}]}}',
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(content):
    _tune.cache_file().write_text(content)
    with pytest.warns(UserWarning, match="ignored"):
        assert _tune.remembered("operator", "launch", (torch.ones(1), 2)) is None
    with pytest.warns(UserWarning, match="ignored"):
        run_tune(torch.ones(1))
    assert len(json.loads(_tune.cache_file().read_text())["entries"]) == 1


def test_another_version_is_not_read():
    _tune.cache_file().write_text('{"version": 0, "entries": {"a": ["Launch", {}]}}')
    assert _tune.load(_tune.cache_file()) == {}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    _tune.save(_tune.cache_file(), {"a": FAST})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        _tune.save(_tune.cache_file(), {})
    assert _tune.load(_tune.cache_file()) == {"a": FAST}
    assert [path.name for path in folder.iterdir()] == ["triton.json"]
