"""Conversion rules for timm's module types; importing this package registers them.

A *factor* is a function of the input that multiplies features: an attention matrix, a gate, a norm's scale.
Explanation mode must hold it, but timm computes most factors inside a `forward`. If the factor passes through
a child there (the softmax through `attn_drop`, a gate through `gate` or `act`), the rule makes that child
hold its output, and timm's `forward` is kept. If there is no such child, a subclass overrides `forward`.

The *linear path* is the one of the features that factors multiply. Its layers become B-cos layers. Layers
that only compute a factor stay ordinary.
"""

from pipelines.models.rules.timm import (
    activations,
    attention_by_child,
    attention_by_subclass,
    convolutions,
    gates,
    norms,
    refused,
    without_factors,
)
