"""Weights from files: Caffe's, torch's and safetensors', and the preprocessing that goes with them."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
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
from tests.support.alexnets import assert_same, tiny

SMALL = {"hidden": 8, "num_classes": 5}


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
