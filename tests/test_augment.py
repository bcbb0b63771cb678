"""augment on every backend: the transform chain bit for bit, whatever the shape, layout, dtype and pitch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex
from fastalex import costs, ops, reference
from fastalex._explain import explanation
from fastalex.ops.augment import AUGMENT, DTYPES
from tests.support.backends import BACKENDS, running

IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


@dataclass(frozen=True)
class Case:
    """A batch of ``images`` [N, H, W, C] and the crop taken of each."""

    images: tuple[int, int, int, int]
    size: tuple[int, int]
    gap: int = 0  # pixels between rows
    mean_is_image: bool = True
    scale: float = 1.0
    strided: bool = False

    def arguments(self):
        n, h, w, c = self.images
        generator = torch.Generator().manual_seed(hash(self.images) % 1000)
        room = torch.tensor([h - self.size[0] + 1, w - self.size[1] + 1])
        x = torch.randint(0, 256, self.images, dtype=torch.uint8, generator=generator)
        if self.strided:  # rows and images lie apart
            x = torch.nn.functional.pad(x, (0, 0, 2, 3, 1, 1))[:, 1:-1, 2:-3]
            assert torch.Size(self.images) == x.shape
        corners = (torch.rand(n, 2, generator=generator, dtype=torch.float64) * room).long()
        if n > 1:
            corners[0], corners[1] = 0, room - 1  # the extremes
        mirrored = torch.arange(n) % 2 == 1
        shift = torch.randn(n, c, generator=generator) * 10
        mean = torch.rand(h, w, c, generator=generator) * 255
        return x, corners, mirrored, shift, mean if self.mean_is_image else mean[0, 0]

    def call(self, dtype=torch.float32):
        pitch = self.size[1] + self.gap
        return ops.augment(*self.arguments(), self.size, scale=self.scale, pitch=pitch, dtype=dtype)


# Row lengths in elements stand around the vector widths of 4, 8 and 16.
CASES = (
    Case((4, 20, 22, 3), (13, 11)),
    Case((4, 20, 22, 3), (13, 11), gap=1, scale=1 / 58),
    Case((3, 9, 9, 3), (9, 9), gap=3, mean_is_image=False),
    Case((5, 6, 40, 3), (5, 16), mean_is_image=False, scale=0.1),
    Case((3, 7, 8, 1), (5, 7)),
    Case((3, 7, 8, 1), (5, 8), gap=2),
    Case((3, 7, 20, 2), (4, 17), mean_is_image=False),
    Case((3, 7, 9, 4), (6, 4)),
    Case((3, 12, 12, 3), (7, 9), strided=True),
    Case((2, 5, 5, 5), (1, 1)),
    Case((1, 1, 1, 1), (1, 1)),
    Case((0, 8, 8, 3), (4, 4)),
    Case((2, 256, 256, 3), (227, 227), gap=1),
)


def chain(x, corners, mirrored, shift, mean, case: Case, dtype):
    """torchvision's transforms, an image at a time."""
    v2 = pytest.importorskip("torchvision.transforms.v2").functional
    made = []
    for index in range(len(x)):
        place = (*corners[index].tolist(), *case.size)
        image = v2.crop(x[index].permute(2, 0, 1), *place)
        average = (
            mean.permute(2, 0, 1) if mean.dim() == 3 else mean[:, None, None].expand(image.shape)
        )
        if mean.dim() == 3:
            average = v2.crop(average, *place)
        if mirrored[index]:
            image, average = v2.horizontal_flip(image), v2.horizontal_flip(average)
        image = v2.to_dtype(image, torch.float32, scale=False) + shift[index][:, None, None]
        made.append(((image - average) * case.scale).to(dtype))
    return torch.stack(made) if made else torch.empty(0, x.shape[3], *case.size, dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bit_is_the_transform_chains(backend, dtype, case):
    with running(backend):
        made = case.call(dtype)
    arguments = case.arguments()
    assert torch.equal(made, chain(*arguments, case, dtype))
    n, _, _, c = case.images
    height, width = case.size
    pitch = width + case.gap
    if n:
        assert made.stride()[1:] == (1, pitch * c, c)
        rows = made.as_strided((n, height, pitch, c), (height * pitch * c, pitch * c, c, 1))
        assert not rows[:, :, width:].any()  # and no NaN of poisoned memory


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fake_tells_shape_dtype_and_strides(case):
    pitch = case.size[1] + case.gap
    rest = (case.size, case.scale, pitch, torch.bfloat16)
    with FakeTensorMode() as mode:
        promised = AUGMENT.dispatch(*(mode.from_tensor(t) for t in case.arguments()), *rest)
    for backend in BACKENDS[:2]:
        with running(backend):
            made = AUGMENT.run(*case.arguments(), *rest)
        assert (made.shape, made.dtype) == (promised.shape, promised.dtype)
        if made.numel():
            assert made.stride() == promised.stride()


def test_opcheck():
    case = CASES[1]
    rest = (case.size, case.scale, case.size[1] + case.gap, torch.float32)
    torch.library.opcheck(AUGMENT.dispatch, (*case.arguments(), *rest))


def test_shift_and_mean_are_optional():
    x, corners, mirrored, shift, mean = CASES[0].arguments()
    plain = ops.augment(x, corners, mirrored, size=(13, 11))
    zeros = ops.augment(x, corners, mirrored, shift * 0, mean * 0, (13, 11))
    assert torch.equal(plain, zeros)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("corner", [(8, 0), (0, 12), (-1, 0), (0, -1)])
def test_crops_outside_an_image_are_refused(backend, corner):
    x, corners, *rest = CASES[0].arguments()
    corners[2] = torch.tensor(corner)
    message = rf"corners\[2\] is \[{corner[0]}, {corner[1]}\]; .* between \[0, 0\] and \[7, 11\]"
    with running(backend), pytest.raises(ValueError, match=message):
        ops.augment(x, corners, *rest, (13, 11))


def replaced(index, value):
    arguments = list(CASES[0].arguments())
    arguments[index] = value(arguments[index])
    return arguments


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, lambda t: t.float(), r"images is torch.float32 .* it must be uint8 \[N, H, W, C\]"),
        (0, lambda t: t[0], r"images is torch.uint8 \[20, 22, 3\]"),
        (1, lambda t: t.int(), r"corners is torch.int32 \[4, 2\]; it must be int64 \[4, 2\]"),
        (1, lambda t: t[:3], r"corners is torch.int64 \[3, 2\]"),
        (2, lambda t: t.long(), r"mirrored is torch.int64 \[4\]; it must be bool \[4\]"),
        (3, lambda t: t[:, :2], r"shift is torch.float32 \[4, 2\]; it must be float32 \[4, 3\]"),
        (4, lambda t: t.double(), r"mean is torch.float64 .* float32 \[3\] or \[20, 22, 3\]"),
        (4, lambda t: t.to("meta"), "mean is on meta and images on cpu"),
        (4, lambda t: t.requires_grad_(), "mean requires a gradient; augment has none: detach it"),
    ],
)
def test_wrong_tensors_are_named(index, value, message):
    with pytest.raises(ValueError, match=message):
        ops.augment(*replaced(index, value), (13, 11))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 21}, r"size is \(21, 21\); the images are \(20, 22\)"),
        ({"size": 0}, "size is 0; it must be at least 1"),
        ({"size": 13, "pitch": 12}, "pitch is 12; it must be at least the width 13"),
        ({"size": 13, "dtype": torch.float64}, "dtype is torch.float64; it can be float32"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.augment(*CASES[0].arguments(), **arguments)
    with pytest.raises(TypeError, match="images must be a Tensor, got list"):
        ops.augment([], *CASES[0].arguments()[1:])


def test_it_is_explained_and_has_no_gradient():
    case = CASES[0]
    text = explanation("augment", *case.arguments(), case.size)
    assert text.startswith("augment: runs on cpu\n")
    made = case.call()
    assert not made.requires_grad
    with fastalex.use_backend("torch"):
        assert explanation("augment", *case.arguments(), case.size).startswith(
            "augment: runs on torch (forced)\n"
        )


def test_threads_do_not_change_a_bit():
    case = CASES[-1]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(case.call())
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_vmap_folds_into_the_batch():
    x, corners, mirrored, shift, mean = CASES[0].arguments()
    pairs = [t.unflatten(0, (2, 2)) for t in (x, corners, mirrored, shift)]
    mapped = torch.func.vmap(lambda *t: ops.augment(*t, mean, (13, 11)))(*pairs)
    whole = ops.augment(x, corners, mirrored, shift, mean, (13, 11))
    assert torch.equal(mapped.flatten(0, 1), whole)


def test_it_compiles_once_for_every_batch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *t: ops.augment(*t, (13, 11), pitch=12), fullgraph=True, backend=counter
    )
    for count in (17, 19, 23):  # no other size of the call
        *images, mean = CASES[0].arguments()
        arguments = [t.repeat(6, *(1,) * (t.dim() - 1))[:count].clone() for t in images]
        for argument in arguments:
            torch._dynamo.mark_dynamic(argument, 0)
        made, eager = compiled(*arguments, mean), ops.augment(*arguments, mean, (13, 11), pitch=12)
        assert torch.equal(made, eager)
        assert made.stride() == eager.stride()
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_meta_tensors():
    case = CASES[1]
    made = ops.augment(*(t.to("meta") for t in case.arguments()), case.size, pitch=12)
    assert made.is_meta
    assert made.shape == (4, 3, 13, 11)


def test_the_reference_is_in_the_order_of_the_schema():
    """Its own walk: augment alone of all operators has no backward half."""
    import inspect

    names = [argument.name for argument in AUGMENT.dispatch._schema.arguments]
    assert list(inspect.signature(reference.augment).parameters) == names
    assert [kernel.backend for kernel in AUGMENT.kernels.kernels] == ["cpu", "triton", "torch"]


def test_cost_by_hand():
    x, corners, mirrored, shift, mean = CASES[0].arguments()
    cost = costs.augment(x, corners, mirrored, shift, mean[0, 0], (13, 11), 1.0, 12, torch.bfloat16)
    constants = 4 * 2 * 8 + 4 + 4 * 3 * 4 + 3 * 4
    assert cost == costs.Cost(4 * 13 * 3 * (11 + 12 * 2) + constants, 4 * 13 * 3 * 11 * 3)
