"""RTS: a trained net draws the map in one pass (Dabkowski & Gal 2017, "Real Time Saliency")."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct

from adv2_jax import losses
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.nets.saliency_unet import Saliency
from adv2_jax.types import (
  Array,
  Carry,
  Image,
  InputError,
  Key,
  Label,
  Map,
  PyTree,
  Unrolled,
  tell_pickle,
)


class Decoder(flax.struct.PyTreeNode):
  """A trained saliency net with its encoder; `zoo.load_decoder` reads one.

  Attributes:
    params: its variables.
    apply_fn: (params, x in [0,1], y) -> Saliency; normalisation is inside.
    num_classes: classes that the selector knows.
    classes: those it was trained on, None: all.
  """

  params: PyTree
  apply_fn: Callable[[PyTree, Image, Label], Saliency] = flax.struct.field(pytree_node=False)
  num_classes: int = flax.struct.field(pytree_node=False)
  classes: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)

  def __post_init__(self):
    """See `tell_pickle`."""
    tell_pickle(self.apply_fn)


def rts(decoder: Decoder, encoder_weight: float = 0.1) -> Interpreter:
  """RTS: m = |a| / (|a| + |b|), the two channels of the decoder for class y.

  In the attack, `encoder_weight` · cross-entropy of the encoder's own logits to the class is a
  further loss term, so that the selector sees the class in the features (published: 0.1).

  Raises:
    InputError: no decoder; when traced, the classifier has other classes than its selector.
  """
  if not isinstance(decoder, Decoder):
    raise InputError(f'decoder is {decoder!r}; expected one from load_decoder(…)')
  explain, unroll, begin = _functions(decoder.apply_fn, decoder.num_classes, encoder_weight)
  return Interpreter(
    decoder.params,
    explain,
    unroll,
    begin,
    name='rts',
    passes=(1, 4, 2),  # a pass of its own net counts as one of the classifier's
    classes=decoder.classes,
    shares_pass=True,
  )


@functools.cache
def _functions(
  apply_fn: Callable[[PyTree, Image, Label], Saliency], num_classes: int, encoder_weight: float
) -> tuple[Callable[..., Any], ...]:
  """Memoised because an interpreter's functions are static: new ones would trace all anew."""

  def see(params: PyTree, clf: Any, x: Image, y: Label) -> tuple[Saliency, Array | None]:
    logits = clf(x).logits
    if logits.shape[-1] != num_classes:
      raise InputError(
        f'the decoder knows {num_classes} classes, the classifier {logits.shape[-1]}; '
        'give the decoder that was trained with this classifier'
      )
    return apply_fn(params, x, y), logits

  def explain(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> Map:
    del keys
    return see(params, clf, x, y)[0].map

  def unroll(params: PyTree, clf: Any, x: Image, y: Label, carry: Carry, keys: Key) -> Unrolled:
    del keys
    seen, logits = see(params, clf, x, y)
    extra = encoder_weight * losses.targeted_xent(seen.encoder.logits, y)
    return Unrolled(seen.map[None], carry, extra, logits)

  return explain, unroll, lambda *_: ()


__all__ = ['Decoder', 'rts']
