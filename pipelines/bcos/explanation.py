"""Holding the input-dependent factors of a network while its dynamic weights W(x) are computed.

A B-cos network is dynamic linear: logit_k = W_k(x)·x + constants. Each layer multiplies a linear function of
its input by a factor that depends on the input: the B-cos scale, a norm's 1/sqrt(var + ε), a gate, an
attention matrix. W_k(x) is the gradient of logit k with respect to the input if all these factors count as
constants.

Factors are *held*, not detached: they are constants only in the backward pass that computes W(x). They keep
their graph, so a loss on W(x) or on the logits has its full gradient with respect to the parameters. Two ways
give equal results:

- eager (`Explanation`): an autograd function withholds the factor's gradient while a flag is set;
- compiled (`TracedExplanation`): W(x) is computed by `torch.func.grad`. Factors are unwrapped from it, which
  makes them constants inside it and leaves them differentiable outside.

Source: Böhle et al., B-cos Alignment, TPAMI 2024, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Explanation:
    """How all layers of a model treat their factors while one explanation is computed.

    Attributes:
        detach: no loss on W(x) follows, so factors are detached, which is faster than holding them.
        holding: factors are constants in the backward passes that run while this is set.
        of_input: set while a backward pass computes W(x), which needs no gradients of parameters.
        differentiated: a backward pass has run with `create_graph=True` while factors were held.
        entry: input of the network's body, if later backward passes (of a loss) need no gradient of the
            images.
    """

    def __init__(self, detach: bool = False) -> None:
        self.detach = detach
        self.holding = True
        self.of_input = False
        self.differentiated = False
        self.entry: Tensor | None = None

    @property
    def fused(self) -> bool:
        """True if layers may use the autograd functions of `fused`, which call `holds`, instead of `hold`."""
        return not self.detach

    def holds(self) -> bool:
        """Returns True if the calling backward pass must treat factors as constants.

        Sets `differentiated` if that pass runs with `create_graph=True`.
        """
        if self.holding and torch.is_grad_enabled():
            self.differentiated = True
        return self.holding

    def hold(self, factor: Tensor) -> Tensor:
        """`factor`, as a constant in the backward passes that run while `holding` is set."""
        if self.detach:
            return factor.detach()
        return _Held.apply(factor, self) if factor.requires_grad else factor

    def observe(self, update: Callable[..., None], *values: Tensor) -> None:
        """Calls `update(*values)`, which updates buffers of a layer (running statistics) from its batch."""
        update(*values)


class TracedExplanation(Explanation):
    """Makes factors constants inside the outermost `torch.func.grad`, in which the network runs.

    Updates of buffers wait until `settle` is called outside: inside `torch.func.grad`, tensors that were made
    outside must not change.
    """

    def __init__(self, detach: bool = False) -> None:
        super().__init__(detach)
        self._waiting: list[tuple[Callable[..., None], tuple[Tensor, ...]]] = []

    @property
    def fused(self) -> bool:
        # the compiler fuses by itself, and compiles autograd functions inside `torch.func.grad` wrongly
        return False

    def hold(self, factor: Tensor) -> Tensor:
        return _outside(factor)

    def observe(self, update: Callable[..., None], *values: Tensor) -> None:
        """Postpones `update(*values)` until `settle` is called."""
        self._waiting.append((update, tuple(_outside(value) for value in values)))

    def settle(self) -> None:
        """Makes the calls that `observe` has postponed."""
        for update, values in self._waiting:
            update(*values)
        self._waiting.clear()


def _outside(value: Tensor) -> Tensor:
    """The tensor that the outermost `torch.func` transform wraps as `value`; `value` if none does."""
    return torch._C._functorch._unwrap_for_grad(value, 1)


@contextmanager
def recording() -> Iterator[None]:
    """Context manager in which autograd records, even inside the caller's `no_grad` or `inference_mode`."""
    with (
        torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(),
        torch.enable_grad(),
    ):
        yield


def usable(tensor: Tensor) -> Tensor:
    """`tensor`, cloned if it is an inference tensor, which autograd cannot save for a backward pass."""
    return tensor.clone() if tensor.is_inference() else tensor


class _Held(torch.autograd.Function):
    """The identity. Its gradient is `None` while the explanation holds its factors."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, explanation: Explanation) -> Tensor:
        ctx.explanation = explanation
        ctx.set_materialize_grads(False)
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        return None if ctx.explanation.holds() else gradient, None


class HoldState:
    """Holds a layer's current explanation in a plain object, whose changes torch.compile can trace."""

    def __init__(self) -> None:
        self.explanation: Explanation | None = None


class Explainable(nn.Module):
    """A layer whose forward pass can read the current explanation."""

    hold_state: HoldState

    def __new__(cls, *args: Any, **kwargs: Any) -> Explainable:
        """Gives every new layer, including copied and unpickled ones, a state outside explanation mode."""
        layer = super().__new__(cls)
        object.__setattr__(layer, "hold_state", HoldState())
        return layer

    @property
    def explanation(self) -> Explanation | None:
        """The current explanation; `None` outside explanation mode."""
        return self.hold_state.explanation

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "hold_state"}


class Holdable(Explainable):
    """A layer with an input-dependent factor, which its `forward` must pass through `hold`."""

    def hold(self, factor: Tensor) -> Tensor:
        """`factor` itself outside explanation mode; held or detached in it, see `Explanation.hold`."""
        explanation = self.hold_state.explanation
        return factor if explanation is None else explanation.hold(factor)

    def observe(self, update: Callable[..., None], *values: Tensor) -> None:
        """Calls `update(*values)`, which updates buffers; a traced explanation postpones the call."""
        explanation = self.hold_state.explanation
        if explanation is None:
            update(*values)
        else:
            explanation.observe(update, *values)

    def computing_factor(self) -> AbstractContextManager[Any]:
        """Context in which a layer computes its factor: `no_grad` if the explanation detaches factors."""
        explanation = self.hold_state.explanation
        return torch.no_grad() if explanation is not None and explanation.detach else nullcontext()


def hold_states(model: nn.Module) -> list[HoldState]:
    """The hold states of all explainable layers of `model`."""
    return [module.hold_state for module in model.modules() if isinstance(module, Explainable)]


@contextmanager
def explaining(model: nn.Module, explanation: Explanation | None) -> Iterator[Explanation | None]:
    """Context manager that sets the explanation of all explainable layers; `None` ends explanation mode."""
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
    """Context manager in which the gradient of a logit with respect to the input is its row of W(x).

    The factors of a forward pass that runs in the block are held in all backward passes through it. If one of
    these runs with `create_graph=True` (because W(x) goes into a loss), the factors are released at the end
    of the block, so that the loss has its full gradient. Autograd records in the block even if the caller has
    turned it off; inference tensors from before the block must be cloned in it. Re-entrant and
    exception-safe. Only one thread at a time may explain a model.

    Source: Böhle et al., B-cos Alignment, TPAMI 2024, section 3.2.
    """
    current = next((state.explanation for state in hold_states(model)), None)
    if current is not None and not current.detach:  # nested: the outer block releases the factors
        with recording():
            yield model
        return
    explanation = Explanation()
    try:
        with recording(), explaining(model, explanation):
            yield model
    finally:
        explanation.holding = not explanation.differentiated
