"""An operator of ``torch.ops.fastalex``: schema, kernels, fake, autograd, vmap, and the way past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalex import _tuning
from fastalex.backends import KernelTable, forced

LIBRARY = torch.library.Library("fastalex", "DEF")

#: Every operator by name; a test walks it.
REGISTRY: dict[str, Operator] = {}

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether anything (gradients, tracing, transforms, subclasses, modes) must see the operator itself.

    Calling the kernel straight saves about ten microseconds, which a network at batch 1 feels.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return True
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES or (grad and tensor.requires_grad)
        ):
            return True
    return False


def needs_reference() -> bool:
    """Whether forward-mode or torch.func derivatives are taken: torch.library operators have none."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    levels = torch._C._functorch.get_interpreter_stack()
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in levels)


class Operator:
    """``fastalex::<name>``, run by the first backend of its table that takes the call."""

    def __init__(self, schema: str, fake: Callable[..., Any]) -> None:
        self.name = schema.partition("(")[0]
        self.kernels = KernelTable(self.name)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastalex::{self.name}", fake, lib=LIBRARY)
        self.dispatch = getattr(torch.ops.fastalex, self.name).default
        REGISTRY[self.name] = self

    def run(self, *args: Any) -> Any:
        """Runs the call on the chosen backend; no gradients."""
        if args[0].is_cuda and forced() is None:
            _tuning.settle(self.kernels, args)
        return self.kernels.choose(*args).run(*args)

    def register_autograd(self, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
        torch.library.register_autograd(
            f"fastalex::{self.name}", backward, setup_context=setup, lib=LIBRARY
        )

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
