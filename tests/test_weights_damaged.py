"""Files of weights that are wrong, damaged or hostile: our error, an untouched model, and no code run."""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastalex.models import (
    WeightsError,
    load_weights,
)
from tests.support import caffemodel
from tests.support.alexnets import assert_same, tiny


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def changed(**changes: object) -> dict[str, object]:
    state = dict(tiny().state_dict())
    state.update(changes)
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(**{"fc8.bias": None}), "fc8.bias missing, none not in the model"),
        (changed(extra=torch.ones(1)), "none missing, extra not in the model"),
        (changed(**{"conv1.bias": torch.ones(3)}), r"conv1.bias is \[3\] and the model's \[2\]$"),
        (tiny(9).state_dict(), r"build the model with num_classes=9, or pass keep_head=True"),
        (changed(**{"fc8.bias": torch.ones(3).int()}), "strided tensor of torch.int32"),
        (changed(**{"fc8.bias": torch.ones(3) * 1j}), "tensor of torch.complex64"),
        (changed(**{"fc8.bias": torch.ones(3).to_sparse()}), "sparse_coo tensor"),
        (changed(**{"fc8.bias": torch.ones(3, device="meta")}), "on meta"),
        (changed(**{"fc8.bias": 3.0}), "entry 'fc8.bias' is a float; a state dict holds tensors"),
        ({3: torch.ones(1)}, "the entry of a int key is a Tensor"),
        ([torch.ones(1)], "holds a list of no tensors; it must be a state dict"),
        ({}, "holds a dict of 0 tensors"),
        ({"state_dict": 5}, "the entry 'state_dict' is a int"),
        (changed(**{"module.fc8.bias": torch.ones(3)}), "two entries are named 'fc8.bias'"),
        # A shape that no machine holds costs nothing to declare.
        (
            changed(**{"fc8.bias": torch.ones(1).expand(1 << 60)}),
            r"fc8.bias is \[1152921504606846976\]",
        ),
    ],
)
def test_checkpoints_of_another_network(tmp_path, content, message):
    model = tiny()
    before = copy.deepcopy(model)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, saved(tmp_path / "net.pth", content))
    assert_same(model, before)


def test_keep_head_of_a_checkpoint(tmp_path):
    source, model = tiny(9), tiny()
    head = copy.deepcopy(model.fc8)
    load_weights(model, saved(tmp_path / "net.pth", source.state_dict()), keep_head=True)
    assert_same(model.fc8, head)
    assert_same(model.conv1, source.conv1)


class Bomb:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_bomb_does_not_run(tmp_path, zipped):
    mark = tmp_path / "mark"
    path = tmp_path / "net.pth"
    torch.save({"state_dict": Bomb(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="not a file of plain tensors"):
        load_weights(tiny(), path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(WeightsError, match="not a file of plain tensors"):
        load_weights(tiny(), path)
    assert not mark.exists()


def test_deep_nesting(tmp_path):
    depth = 100_000
    pickled = b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * depth + b"a" * (depth - 1) + b"s."
    path = saved(tmp_path / "whole.pth", {})
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "net.pth", "w") as out:
        for entry in whole.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            out.writestr(entry.filename, pickled if is_pickle else whole.read(entry))
    with pytest.raises(WeightsError, match="the entry 'a' is a list"):
        load_weights(tiny(), tmp_path / "net.pth")
    # Messages inside messages, beyond what protobuf follows.
    data = b""
    for _ in range(5000):
        data = caffemodel.chunk(2, caffemodel.chunk(1, data))
    path = tmp_path / "net.caffemodel"
    path.write_bytes(data)
    with pytest.raises(WeightsError):
        load_weights(tiny(), path)


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    plain = io.BytesIO()
    torch.save(tiny().state_dict(), plain)
    path = tmp_path / "net.pth"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
    with pytest.raises(WeightsError, match="compressed archive"):
        load_weights(tiny(), path)


def declared(*sizes: int, values: int = 4) -> bytes:
    """A blob whose declared sizes have nothing to do with its four values."""
    shape = caffemodel.chunk(1, b"".join(caffemodel.varint(size) for size in sizes))
    return caffemodel.chunk(7, shape) + caffemodel.chunk(5, bytes(4 * values))


def wrapped(blob: bytes) -> bytes:
    body = caffemodel.chunk(1, b"conv1") + caffemodel.chunk(7, blob)
    return caffemodel.net(caffemodel.chunk(100, body))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no layer has weights; is it a .caffemodel"),
        (b"not a caffemodel", "not a Caffe file, or a damaged one|no layer has weights"),
        (caffemodel.of_model(tiny())[:-40], "not a Caffe file, or a damaged one"),
        (wrapped(declared(1 << 40, 1 << 40)), "a blob of shape .* has 16 bytes of torch.float32"),
        (wrapped(declared(-1, -4)), r"a blob of shape \[-1, -4\]"),
        (wrapped(declared(0, values=0)), r"a blob of shape \[0\] has 0 bytes"),
        (wrapped(declared(5)), r"a blob of shape \[5\] has 16 bytes of torch.float32"),
        (wrapped(declared(*[1] * 4000, 4)), "conv1.weight|missing"),
        (
            caffemodel.of_model(tiny(9)),
            r"fc8.weight is \[9, 4\] and .* build the model with num_classes=9",
        ),
        (
            caffemodel.of_model(tiny(), lambda name: name + "x"),
            "conv1.weight, conv1.bias, .* missing",
        ),
        (caffemodel.of_model(tiny()) * 2, "two layers are named 'conv1'"),
        (caffemodel.net(caffemodel.layer("conv1", [torch.ones(2, 3, 3, 3)])), "missing"),
    ],
)
def test_caffe_files_of_another_network(tmp_path, data, message):
    model = tiny()
    before = copy.deepcopy(model)
    path = tmp_path / "net.caffemodel"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, path)
    assert_same(model, before)


def test_a_model_without_memory_is_refused(tmp_path):
    path = saved(tmp_path / "net.pth", tiny().state_dict())
    with pytest.raises(ValueError, match="the model is on the meta device"):
        load_weights(tiny().to("meta"), path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".caffemodel"])
def test_a_missing_file_is_an_os_error(tmp_path, suffix):
    with pytest.raises(FileNotFoundError):
        load_weights(tiny(), tmp_path / f"none{suffix}")


def whole_files() -> dict[str, bytes]:
    """One good file of each kind."""
    torch.manual_seed(0)
    files = {
        f".caffemodel/{form}": caffemodel.of_model(tiny(), form=form) for form in caffemodel.FORMS
    }
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(tiny().state_dict(), buffer, _use_new_zipfile_serialization=zipped)
        files[f".pth/{'zip' if zipped else 'legacy'}"] = buffer.getvalue()
    from safetensors.torch import save

    files[".safetensors/"] = save(tiny().state_dict())
    return files


FILES = whole_files()


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A good file cut short, with bytes replaced, or with a slice repeated or removed."""
    kind = draw(st.sampled_from(sorted(FILES)))
    data = bytearray(FILES[kind])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(0, 40))
        change = draw(st.sampled_from(["cut", "replace", "remove", "repeat"]))
        if change == "cut":
            del data[at:]
        elif change == "remove":
            del data[at : at + length]
        elif change == "repeat":
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
    return kind.partition("/")[0], bytes(data)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(file=damaged())
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damage_is_our_error_and_leaves_the_model(tmp_path, file):
    suffix, data = file
    path = tmp_path / f"net{suffix}"
    path.write_bytes(data)
    model = tiny()
    before = copy.deepcopy(model)
    try:
        load_weights(model, path)
    except WeightsError:
        assert_same(model, before)
