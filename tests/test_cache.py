"""The files kept between processes: private, versioned, and ignored with a warning where tampered with."""

from __future__ import annotations

import json
import os
import stat
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastalex.kernels._configs import Launch

from fastalex import _cache, _cupy, _tuning
from fastalex._tuning import Choice

WINNER = Choice("triton", {"launch": Launch(128, 4)})
X = torch.zeros(3, 4)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FASTALEX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_tuning, "DEVICES", {"cpu"})
    _tuning.forget()
    yield tmp_path / "cache"
    _tuning.forget()


def keep_both() -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Each cache with something in it: its file, and what reads it."""
    _tuning.record("double", (X,), WINNER)
    _cupy.save("a key", b"code" * 100, "name")
    code = _cupy.cache_file("a key")
    assert _cupy.load("a key") == (b"code" * 100, "name")
    return {
        "tuning": (_tuning.cache_file(), lambda: _tuning.load(_tuning.cache_file()) or None),
        "cubin": (code, lambda: _cupy.load("a key")),
    }


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_folders_and_files_are_the_users_alone(folder: Path) -> None:
    before = os.umask(0)  # a careless one
    try:
        keep_both()
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert len(found) == 4
    for path, mode in found.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path


def as_link(path: Path) -> None:
    elsewhere = path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(elsewhere)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # opening one waits for a writer, for ever


def huge(path: Path) -> None:
    os.truncate(path, _cache.LARGEST + 1)


def writing(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


TAMPERED: dict[str, Callable[[Path], None]] = {
    "anyone may write it": lambda path: path.chmod(0o606),
    "a group may write it": lambda path: path.chmod(0o660),
    "a link": as_link,
    "a folder": as_folder,
    "a pipe": as_pipe,
    "huge": huge,
    "empty": writing(lambda data: b""),
    "cut short": writing(lambda data: data[: len(data) // 2]),
    "pickle": writing(lambda data: b"\x80\x04cos\nsystem\n(S'touch owned'\ntR." + data),
    "not UTF-8": writing(lambda data: b"\xff\xfe" + data),
    "nested": writing(lambda data: b"[" * 100_000 + b"\n" + data),
    "a list": writing(lambda data: b"[1, 2]\n"),
    "a number": writing(lambda data: b"NaN\n"),
}


@pytest.mark.skipif(os.name != "posix", reason="files of a POSIX system")
@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
@pytest.mark.parametrize("cache", ["tuning", "cubin"])
def test_a_tampered_file_is_ignored_with_a_warning(cache: str, tamper: Any, folder: Path) -> None:
    path, read = keep_both()[cache]
    tamper(path)
    with pytest.warns(UserWarning, match=rf"{path.name} is ignored.*delete it"):
        assert read() is None
    assert not Path("owned").exists()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no users")
@pytest.mark.parametrize("cache", ["tuning", "cubin"])
def test_a_file_of_another_user_is_ignored_with_a_warning(cache: str, monkeypatch: Any) -> None:
    _, read = keep_both()[cache]
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.warns(UserWarning, match="another user could have written it"):
        assert read() is None


@pytest.mark.parametrize(
    "entry",
    [
        ["os.system", {}],
        ["cpu", {}],
        [["triton"], {}],
        ["triton", {"launch": ["Launch", {"block": "128", "warps": 4, "rows": 1}]}],
        ["triton", {"launch": ["Launch", {"block": 1e300, "warps": 4, "rows": 1}]}],
        ["triton", {"launch": ["Launch", {"block": 2**40, "warps": 4, "rows": 1}]}],
        ["triton", {"launch": ["Launch", {"block": -1, "warps": 4, "rows": 1}]}],
        ["triton", {"launch": ["Launch", {"block": True, "warps": 4, "rows": 1}]}],
        ["triton", {"launch": ["Launch", {"block": float("nan"), "warps": 4, "rows": 1}]}],
        ["triton", {"launch": ["Launch", {"block": 128}]}],
        ["triton", {"launch": ["Launch", {"block": 128, "warps": 4, "and": 1}]}],
        ["triton", {"launch": ["Launch", "block"]}],
        ["triton", {"launch": ["os.system", {"command": "touch owned"}]}],
        ["triton", {"launch": "Launch"}],
        ["triton", None],
        "triton",
        None,
    ],
    ids=str,
)
def test_a_winner_that_we_would_not_write_is_ignored_with_a_warning(entry: Any) -> None:
    content = {"version": _tuning.VERSION, "entries": {"a call": entry}}
    _cache.write(_tuning.cache_file(), json.dumps(content).encode())
    with pytest.warns(UserWarning, match="is ignored"):
        assert _tuning.load(_tuning.cache_file()) == {}


def test_another_version_is_no_news() -> None:
    """What an older or newer fastalex wrote is not read, and nobody is told."""
    keep_both()
    content = json.loads(_tuning.cache_file().read_text())
    content["version"] += 1
    _cache.write(_tuning.cache_file(), json.dumps(content).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tuning.load(_tuning.cache_file()) == {}


@pytest.mark.filterwarnings("ignore:.*is ignored")  # nor read
def test_a_disk_that_takes_nothing_costs_no_call(folder: Path) -> None:
    folder.write_text("in the way")
    with pytest.warns(UserWarning, match=r"tuning\.json could not be kept"):
        _tuning.record("double", (X,), WINNER)
    assert _tuning.recorded("double", (X,)) == WINNER  # in this process


def test_threads_that_record_at_once_lose_nothing() -> None:
    calls = [torch.zeros(1, count) for count in range(1, 25)]
    barrier = threading.Barrier(4)

    def work(first: int) -> None:
        barrier.wait()
        for x in calls[first::4]:
            _tuning.record("double", (x,), WINNER)
            assert _tuning.recorded("double", (x,)) == WINNER

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _tuning.forget()  # as a new process
    assert all(_tuning.recorded("double", (x,)) == WINNER for x in calls)
    assert len(_tuning.memory()) == len(calls)
