"""Weights from files: Caffe's, torch's and safetensors', whole, wrong, damaged and hostile."""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastalex.models import (
    PREPROCESSING,
    GoogLeNet,
    NetworkInNetwork,
    Preprocessing,
    WeightsError,
    alexnet,
    load_mean,
    load_weights,
)
from tests.support import caffemodel

SMALL = {"hidden": 8, "num_classes": 5}


def tiny(classes: int = 3) -> nn.Sequential:
    """Names and ranks as in the real networks, in 100 numbers."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 2, 2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(2, 4, 2, groups=2),
            flatten=nn.Flatten(),
            fc8=nn.Linear(4, classes),
        )
    )


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name


# --- Caffe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", caffemodel.FORMS)
def test_caffe_forms(tmp_path, form):
    source, model = tiny(), tiny()
    path = tmp_path / "net.caffemodel"
    path.write_bytes(caffemodel.of_model(source, form=form))
    assert load_weights(model, path) is model
    assert_same(model, source)


def test_a_caffe_network_sees_rgb(tmp_path):
    """What Caffe computes from a BGR image is what the model computes from the same image in RGB."""
    weight, bias = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2).double()
    path = tmp_path / "net.caffemodel"
    path.write_bytes(caffemodel.net(caffemodel.layer("conv1", [weight, bias], double=True)))
    model = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 2, 2).double()))
    load_weights(model, path)
    rgb = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model(rgb), F.conv2d(rgb.flip(1), weight, bias))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("preset", ["caffenet", "bvlc"])
def test_alexnet_from_caffe(tmp_path, preset, fused):
    source = alexnet(preset, **SMALL)
    path = tmp_path / "net.caffemodel"
    path.write_bytes(caffemodel.of_model(source, form="v1"))
    assert_same(load_weights(alexnet(preset, fused=fused, **SMALL), path), source)


#: The layers of bvlc_googlenet.caffemodel that have weights, in its order.
GOOGLENET_LAYERS = [
    "conv1/7x7_s2",
    "conv2/3x3_reduce",
    "conv2/3x3",
    *(
        f"inception_{module}/{branch}"
        for module in ("3a", "3b", "4a")
        for branch in ("1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj")
    ),
    "loss1/conv",
    "loss1/fc",
    "loss1/classifier",
    "loss2/conv",
    "loss2/fc",
    "loss2/classifier",
    "loss3/classifier",
]


def test_googlenet_from_caffe(tmp_path):
    source = GoogLeNet(num_classes=5)
    convolutions = [
        name
        for name, module in source.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    names = [source.caffe_name(name) for name in convolutions]
    assert (
        len(names) == len(set(names)) == 64
    )  # 57 convolutions, 7 more in the auxiliary heads and the last
    assert set(GOOGLENET_LAYERS) <= set(names)
    path = tmp_path / "net.caffemodel"
    path.write_bytes(caffemodel.of_model(source, source.caffe_name))
    assert_same(load_weights(GoogLeNet(num_classes=5), path), source)
    without = load_weights(GoogLeNet(num_classes=5, auxiliary=False), path)
    assert torch.equal(
        without.inception_4d.conv3x3.conv.weight, source.inception_4d.conv3x3.conv.weight
    )
    other = GoogLeNet(num_classes=7)
    heads = copy.deepcopy(other.loss1.classifier), copy.deepcopy(other.classifier)
    load_weights(other, path, keep_head=True)
    assert_same(nn.Sequential(other.loss1.classifier, other.classifier), nn.Sequential(*heads))
    assert torch.equal(other.loss1.fc.weight, source.loss1.fc.weight)


def test_network_in_network_from_caffe(tmp_path):
    source = NetworkInNetwork(5)
    path = tmp_path / "net.caffemodel"
    path.write_bytes(caffemodel.of_model(source, source.caffe_name))
    assert {
        source.caffe_name(n) for n in ("features.conv4", "features.cccp8", "features.cccp6")
    } == {
        "conv4-1024",
        "cccp8-1024",
        "cccp6",
    }
    assert_same(load_weights(NetworkInNetwork(5), path), source)


def test_a_renamed_last_layer_is_the_last_layer(tmp_path):
    source = tiny()
    path = tmp_path / "net.caffemodel"
    path.write_bytes(
        caffemodel.of_model(source, lambda name: "fc8_places" if name == "fc8" else name)
    )
    assert_same(load_weights(tiny(), path), source)
    kept = tiny(7)
    head = copy.deepcopy(kept.fc8)
    load_weights(kept, path, keep_head=True)
    assert_same(kept.fc8, head)
    assert torch.equal(kept.conv2.weight, source.conv2.weight)


def test_mean_image(tmp_path):
    bgr = torch.rand(3, 4, 5)
    path = tmp_path / "mean.binaryproto"
    for legacy in (True, False):
        path.write_bytes(caffemodel.blob(bgr, legacy=legacy))
        assert torch.equal(load_mean(path), bgr.flip(0))
    path.write_bytes(caffemodel.blob(torch.rand(2, 4, 5)))
    with pytest.raises(WeightsError, match=r"shape \[2, 4, 5\]; a mean image is \[1, 3, H, W\]"):
        load_mean(path)


# --- torch and safetensors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {key: nn.Parameter(value) for key, value in state.items()},
        lambda state: {key: value.double() for key, value in state.items()},
    ],
    ids=["plain", "state_dict", "model", "module", "compiled", "parameters", "float64"],
)
def test_checkpoints(tmp_path, wrap):
    source = tiny()
    path = tmp_path / "net.pth"
    torch.save(wrap(source.state_dict()), path)
    assert_same(load_weights(tiny(), path), source)
    torch.save(wrap(source.state_dict()), path, _use_new_zipfile_serialization=False)
    assert_same(load_weights(tiny(), path), source)


def test_torchvision_state_dict(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.alexnet(num_classes=5)
    path = tmp_path / "alexnet.pth"
    torch.save(theirs.state_dict(), path)
    assert_same(load_weights(alexnet("torchvision", num_classes=5), path), theirs)


def test_safetensors(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    source = tiny()
    path = tmp_path / "net.safetensors"
    library.save_file(source.state_dict(), path)
    assert_same(load_weights(tiny(), path), source)


# --- wrong files ---------------------------------------------------------------------------------


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


# --- preprocessing -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 400), (375, 503), (257, 256), (64, 90)])
def test_preprocessing_of_torchvision(size):
    """As the transforms that come with its weights."""
    torchvision = pytest.importorskip("torchvision")
    transform = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.transforms(antialias=True)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    # Theirs rounds the scaled pixels to uint8: half a step, divided by the smallest deviation.
    torch.testing.assert_close(
        PREPROCESSING["torchvision"](images), transform(images), rtol=0, atol=0.51 / 255 / 0.224
    )


def test_preprocessing_of_caffe():
    """Both sides scaled, the mean subtracted from 0 to 255, the centre cut out."""
    prepare = PREPROCESSING["caffenet"]
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    expected = images.float() - torch.tensor(prepare.mean)[:, None, None]
    torch.testing.assert_close(prepare(images), expected[..., 14:241, 14:241])
    assert prepare(torch.zeros(1, 3, 100, 300)).shape == (1, 3, 227, 227)
    image = torch.rand(3, 256, 256) * 255
    with_image = Preprocessing(crop=227, mean=image)(images)
    torch.testing.assert_close(with_image, (images.float() - image)[..., 14:241, 14:241])
    with pytest.raises(ValueError, match="crop is 300; it must be positive, and at most resize"):
        Preprocessing(crop=300)
    with pytest.raises(ValueError, match=r"images are \[N, 3, H, W\] in RGB, got \(3, 4, 4\)"):
        prepare(torch.zeros(3, 4, 4))
