"""An operator of ``torch.ops.fastalex``: schema, kernels, fake, autograd, vmap, and the way past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalex import _onnx, _tuning, reference
from fastalex.backends import KernelTable, forced, use_backend

LIBRARY = torch.library.Library("fastalex", "DEF")

#: Every operator by name; a test walks it.
REGISTRY: dict[str, Operator] = {}

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_AUTOCAST_DEVICES = ("cpu", "cuda")

# Bound once, because looking them up at every call costs as much as calling them.
_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_in_function_mode = torch._C._is_torch_function_mode_enabled
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled
_forward_ad = torch.autograd.forward_ad


def _is_observed() -> bool:
    """Whether a compiler, mode, transform, trace or forward derivative must see the operator itself."""
    return (
        _compiling()
        or _dispatch_modes() > 0
        or _in_function_mode()
        or _transforms() is not None
        or _tracing_state() is not None
        or _forward_ad._current_level >= 0
    )


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether anything (gradients, tracing, transforms, subclasses, modes) must see the operator itself."""
    if _is_observed():
        return True
    grad = _grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES or (grad and tensor.requires_grad)
        ):
            return True
    return False


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but gradients has to see the operators that run on these tensors."""
    return not _is_observed() and all(
        tensor is None or type(tensor) in _PLAIN_TYPES for tensor in tensors
    )


def gradients_may_follow(*tensors: Tensor | None) -> bool:
    """Whether a backward pass could ask for what this call saves."""
    if _grad_enabled():
        for tensor in tensors:  # twice as fast as any() over a generator
            if tensor is not None and tensor.requires_grad:
                return True
    # Inside a torch.func transform an outer level may want gradients that this one cannot see.
    return not _compiling() and _transforms() is not None


def needs_reference() -> bool:
    """Whether forward-mode or torch.func derivatives are taken, or ONNX is written: these operators have neither."""
    if _onnx.exporting() or _forward_ad._current_level >= 0:
        return True
    if _compiling() or _transforms() is None:
        return False
    levels = torch._C._functorch.get_interpreter_stack()
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in levels)


def _with_tuples(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dispatcher makes lists of what kernels know as tuples."""
    return tuple(tuple(value) if isinstance(value, list) else value for value in args)


def autocasting(input: Tensor) -> bool:
    """Whether ``input`` is in an autocast region of its device."""
    device = input.device.type
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def where_forced(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward``, run on the backend that the forward pass was forced to, which it left in ``ctx.forced``.

    Gradients of CUDA tensors are computed in a thread that sees no ``with`` block of its caller.
    """

    def followed(ctx: Any, *grads: Any) -> Any:
        if ctx.forced == forced():
            return backward(ctx, *grads)
        with use_backend(ctx.forced or "auto"):
            return backward(ctx, *grads)

    return followed


class Operator:
    """``fastalex::<name>``, run by the first backend of its table that takes the call.

    Calling it gives the result with whatever torch asks for around it, by the shortest way that does.
    """

    def __init__(self, schema: str, fake: Callable[..., Any]) -> None:
        self.name = schema.partition("(")[0]
        self.kernels = KernelTable(self.name)
        self.reference: Callable[..., Any] = getattr(reference, self.name)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._run_dispatched, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastalex::{self.name}", fake, lib=LIBRARY)
        self.dispatch = getattr(torch.ops.fastalex, self.name).default
        arguments = self.dispatch._schema.arguments
        # Every schema has its tensors first.
        self._tensors = sum("Tensor" in str(argument.type) for argument in arguments)
        REGISTRY[self.name] = self

    def __call__(self, *args: Any) -> Any:
        """The results of the call, differentiable in every way.

        torch's dispatcher, and torch.library's autograd above all, cost more than a small kernel takes: plain tensors
        go past both, to the kernel or to the same formula as a :class:`torch.autograd.Function`.
        """
        if _is_observed():
            if _onnx.exporting():
                return _onnx.FORMS.get(self.name, self.reference)(*args)
            return (self.reference if needs_reference() else self.dispatch)(*args)
        wants_grad = False
        for tensor in args[: self._tensors]:
            if tensor is not None:
                if type(tensor) not in _PLAIN_TYPES:
                    return self.dispatch(*args)
                if tensor.requires_grad:
                    wants_grad = True
        if wants_grad and _grad_enabled():
            return self._run_with_gradients(*args)
        if args[0].is_cuda:
            return self.run(*args)
        return self.kernels.choose(*args).run(*args)  # what run does, one call nearer

    def run(self, *args: Any) -> Any:
        """Runs the call on the chosen backend; no gradients."""
        if args[0].is_cuda and forced() is None:
            _tuning.settle(self.kernels, args)
        return self.kernels.choose(*args).run(*args)

    def run_knowing(self, args: tuple[Any, ...], **known: Any) -> tuple[Any, bool]:
        """What :meth:`run` gives, and whether the kernel made use of what is ``known`` of its tensors."""
        if args[0].is_cuda and forced() is None:
            _tuning.settle(self.kernels, args)
        kernel = self.kernels.choose(*args)
        if kernel.masks:
            return kernel.run(*args, known=known), True
        return kernel.run(*args), False

    def _run_dispatched(self, *args: Any) -> Any:
        return self.run(*_with_tuples(args))

    def register_autograd(
        self, backward: Callable[..., Any], setup: Callable[..., None], beside: bool = False
    ) -> None:
        """One formula, for the dispatcher and for plain tensors; ``setup(ctx, inputs, output)`` saves.

        ``beside``: outputs after the first have no gradient, and pass beside the graph: in it, one costs a small call
        a sixth of its time.
        """

        def setup_dispatched(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.forced = forced()
            setup(ctx, _with_tuples(inputs), output)

        followed = where_forced(backward)
        torch.library.register_autograd(
            f"fastalex::{self.name}", followed, setup_context=setup_dispatched, lib=LIBRARY
        )

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.run(*args)
            ctx.forced = forced()
            setup(ctx, args, output)
            return output

        def forward_of_first(ctx: Any, *args: Any) -> Any:
            first, *args[-1][:] = forward(ctx, *args[:-1])
            return first

        def backward_of_first(ctx: Any, grad: Any) -> Any:
            return *followed(ctx, grad, *no_gradients), None

        def run_with_others_beside(*args: Any) -> Any:
            others: list[Tensor] = []
            return function.apply(*args, others), *others

        no_gradients = (None,) * (len(self.dispatch._schema.returns) - 1)
        methods = (forward_of_first, backward_of_first) if beside else (forward, followed)
        function: Any = type(
            f"fastalex_{self.name}",
            (torch.autograd.Function,),
            dict(zip(("forward", "backward"), map(staticmethod, methods), strict=True)),
        )
        self._run_with_gradients = run_with_others_beside if beside else function.apply

    def differentiate_reference(
        self, reference: Callable[..., Any], tensors: Sequence[int]
    ) -> None:
        """Derives the gradient with respect to the arguments ``tensors`` from the plain-torch reference.

        For backward operators: their own derivative is wanted rarely, and correctness is what counts there.
        """

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            saved = [value if isinstance(value, Tensor) else None for value in inputs]
            ctx.save_for_backward(*saved)
            ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            args = [
                rest if tensor is None else tensor
                for tensor, rest in zip(ctx.saved_tensors, ctx.rest, strict=True)
            ]

            def of_tensors(*values: Tensor) -> Any:
                full = list(args)
                for index, value in zip(tensors, values, strict=True):
                    full[index] = value
                return reference(*full)

            outputs, vjp = torch.func.vjp(of_tensors, *(args[i] for i in tensors))[:2]
            if isinstance(outputs, Tensor):
                results = vjp(grads[0])
            else:
                filled = (
                    torch.zeros_like(out) if grad is None else grad
                    for out, grad in zip(outputs, grads, strict=True)
                )
                results = vjp(tuple(filled))
            gradients: list[Any] = [None] * len(args)
            for index, value in zip(tensors, results, strict=True):
                gradients[index] = value
            return tuple(gradients)

        self.register_autograd(backward, setup)

    def register_autocast(self, tensors: int) -> None:
        """Casts the first ``tensors`` arguments as autocast does for its fast operators: float64 is left alone."""
        for device in _AUTOCAST_DEVICES:
            LIBRARY.impl(self.name, self._autocast(device, tensors), f"Autocast{device.upper()}")

    def _autocast(self, device: str, tensors: int) -> Callable[..., Any]:
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

        def cast(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            narrow = (
                value.to(dtype) if value is not None and value.dtype != torch.float64 else value
                for value in args[:tensors]
            )
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return self.dispatch(*narrow, *args[tensors:])

        return cast

    def register_vmap(self, batched: Sequence[int]) -> None:
        """Under vmap, folds the mapped dimension of the arguments ``batched`` into their batch.

        Where another argument is mapped, the calls run one by one.
        """

        def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            size = info.batch_size
            mapped = [index for index, dim in enumerate(in_dims) if isinstance(dim, int)]
            if not set(mapped) <= set(batched):
                return self._run_one_by_one(size, in_dims, mapped, args)
            folded = list(args)
            for index in batched:
                value = args[index]
                if in_dims[index] is None:
                    value = value.unsqueeze(0).expand(size, *value.shape)
                else:
                    value = value.movedim(in_dims[index], 0)
                folded[index] = value.flatten(0, 1)
            outputs = self.dispatch(*folded)
            if isinstance(outputs, Tensor):
                return outputs.unflatten(0, (size, -1)), 0
            # Maps have dimensions; what was not asked for is an empty vector.
            unfolded = tuple(
                out.unflatten(0, (size, -1)) if out.dim() > 1 else out for out in outputs
            )
            return unfolded, tuple(0 if out.dim() > 1 else None for out in outputs)

        torch.library.register_vmap(f"fastalex::{self.name}", rule, lib=LIBRARY)

    def _run_one_by_one(
        self, size: int, in_dims: tuple[Any, ...], mapped: Sequence[int], args: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        results = []
        for at in range(size):
            selected = list(args)
            for index in mapped:
                selected[index] = args[index].select(in_dims[index], at)
            results.append(self.dispatch(*selected))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0,) * len(
            results[0]
        )
