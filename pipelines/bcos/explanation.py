"""Holding the input-dependent factors of a network while its dynamic weights W(x) are computed.

A B-cos network is dynamic linear: logit_k = W_k(x)·x + constants, where W_k(x) is the gradient of the logit with respect to the
input when every input-dependent factor (the B-cos scale, a norm's standard deviation, a gate, an attention matrix) counts as
constant. Factors are *held* in the backward pass that gives W(x), and only there: they keep their graph, so that a loss on W(x)
or on the logits still has its full gradient with respect to the parameters. There are two ways to do so, with equal results:
an autograd function that withholds the factor's gradient while a flag is set (`Explanation`), and, where a compiler traces the
network, `torch.func.grad`, to which factors are constants that the gradient outside it still sees (`TracedExplanation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Explanation:
    """The state of one explanation, which layers read: whether their factors are held now, or need no graph at all."""

    def __init__(self, detach: bool = False) -> None:
        self.detach = detach  # no loss on W(x) follows: factors can drop their graph, which is faster
        self.holding = True
        self.of_input = False  # whether the pass that runs now is for the gradient of the input alone
        self.differentiated = False  # whether W(x) was computed with a graph of its own
        self.entry: Tensor | None = (
            None  # what the first layer sees, where no gradient of the images is wanted after W(x)
        )

    @property
    def fused(self) -> bool:
        """Whether layers compute factor and product in one autograd function, which asks `holds`, instead of by `hold`."""
        return not self.detach

    def holds(self) -> bool:
        """Whether factors are constant to the backward pass that asks; notes that it is one with a graph."""
        if self.holding and torch.is_grad_enabled():
            self.differentiated = True
        return self.holding

    def hold(self, factor: Tensor) -> Tensor:
        """`factor`, constant to the backward passes that run while `holding` is set."""
        if self.detach:
            return factor.detach()
        return _Held.apply(factor, self) if factor.requires_grad else factor

    def observe(self, update: Callable[..., None], *values: Tensor) -> None:
        """Calls `update(*values)`, which moves a layer's buffers by what its batch shows."""
        update(*values)


class TracedExplanation(Explanation):
    """Factors are constants of the outermost `torch.func.grad`, in which the network runs; differentiated outside, they are not.

    What moves a layer's buffers waits until `settle` is called outside: inside, tensors from elsewhere must not change.
    """

    def __init__(self, detach: bool = False) -> None:
        super().__init__(detach)
        self._waiting: list[tuple[Callable[..., None], tuple[Tensor, ...]]] = []

    @property
    def fused(self) -> bool:
        """Never: the compiler fuses, and what it makes of autograd functions inside `torch.func.grad` is wrong."""
        return False

    def hold(self, factor: Tensor) -> Tensor:
        """`factor` as it is outside."""
        return _outside(factor)

    def observe(self, update: Callable[..., None], *values: Tensor) -> None:
        """Keeps the call until `settle`."""
        self._waiting.append((update, tuple(_outside(value) for value in values)))

    def settle(self) -> None:
        """Makes the calls that wait."""
        for update, values in self._waiting:
            update(*values)
        self._waiting.clear()


def _outside(value: Tensor) -> Tensor:
    """The tensor that the outermost `torch.func` transform wraps as `value`; `value` itself if no transform wraps it."""
    return torch._C._functorch._unwrap_for_grad(value, 1)


@contextmanager
def recording() -> Iterator[None]:
    """In the block autograd records, whatever gradient mode the caller is in: `no_grad` or `inference_mode`."""
    with (
        torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(),
        torch.enable_grad(),
    ):
        yield


def usable(tensor: Tensor) -> Tensor:
    """`tensor`, as a copy if it was made in inference mode, where autograd must not keep it."""
    return tensor.clone() if tensor.is_inference() else tensor


class _Held(torch.autograd.Function):
    """The identity, whose gradient is withheld while its explanation holds."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, explanation: Explanation) -> Tensor:
        ctx.explanation = explanation
        ctx.set_materialize_grads(False)
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        return None if ctx.explanation.holds() else gradient, None


class HoldState:
    """The explanation that a layer's forward pass is for; a plain object, because a compiler can follow its changes."""

    def __init__(self) -> None:
        self.explanation: Explanation | None = None


class Explainable(nn.Module):
    """A layer that knows which explanation its forward pass is for."""

    hold_state: HoldState

    def __new__(cls, *args: Any, **kwargs: Any) -> Explainable:
        """A layer outside explanation mode, also where it is copied or unpickled."""
        layer = super().__new__(cls)
        object.__setattr__(layer, "hold_state", HoldState())
        return layer

    @property
    def explanation(self) -> Explanation | None:
        """The explanation that this forward pass is for; `None` outside explanation mode."""
        return self.hold_state.explanation

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "hold_state"}


class Holdable(Explainable):
    """A layer with an input-dependent factor. In its `forward`, it passes the factor through `hold`."""

    def hold(self, factor: Tensor) -> Tensor:
        """`factor` as the explanation mode of the moment wants it."""
        explanation = self.hold_state.explanation
        return factor if explanation is None else explanation.hold(factor)

    def observe(self, update: Callable[..., None], *values: Tensor) -> None:
        """Calls `update(*values)`, which moves buffers, when the explanation mode of the moment lets it."""
        explanation = self.hold_state.explanation
        if explanation is None:
            update(*values)
        else:
            explanation.observe(update, *values)

    def computing_factor(self) -> AbstractContextManager[Any]:
        """A block in which a factor is computed: without a graph where the explanation needs none."""
        explanation = self.hold_state.explanation
        return torch.no_grad() if explanation is not None and explanation.detach else nullcontext()


def hold_states(model: nn.Module) -> list[HoldState]:
    """The states of all layers of `model` that have one."""
    return [module.hold_state for module in model.modules() if isinstance(module, Explainable)]


@contextmanager
def explaining(model: nn.Module, explanation: Explanation | None) -> Iterator[Explanation | None]:
    """In the block, every explainable layer of `model` has `explanation`; `None`: as outside explanation mode."""
    states = hold_states(model)
    before = [state.explanation for state in states]
    try:
        for state in states:
            state.explanation = explanation
        yield explanation
    finally:
        for state, previous in zip(states, before, strict=True):
            state.explanation = previous


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """In the block, the gradient of a logit of `model` with respect to its input is the row of W(x).

    Factors of a forward pass made in the block are held in the backward passes that follow it. Once one of these was taken with
    `create_graph=True` (W(x) goes into a loss), they are released when the block ends, so that the loss has its full gradient.
    Re-entrant and exception-safe; one thread at a time for one model. Autograd records in the block, also where the caller has
    turned it off; tensors that were made in inference mode before the block must be cloned in it.

    Source: Böhle et al., B-cos Alignment, TPAMI 2024, section 3.2.
    """
    current = next((state.explanation for state in hold_states(model)), None)
    if current is not None and not current.detach:  # nested: the outer block decides when to release
        with recording():
            yield model
        return
    explanation = Explanation()
    try:
        with recording(), explaining(model, explanation):
            yield model
    finally:
        explanation.holding = not explanation.differentiated
