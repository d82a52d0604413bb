"""The saliency net of RTS: a U-Net decoder on a classifier's features (Dabkowski & Gal 2017).

The deepest features are gated by how much they look like the class asked for, then brought up step
by step, joined with the encoder's shallower features, and end in two channels a, b: the map is
|a| / (|a| + |b|). Tensor names are those of the published code (`up2.upsampler.0.0.weight`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adv2_jax import nets
from adv2_jax.nets.layers import BatchNorm, Conv
from adv2_jax.types import Array, Image, InputError, Label, Map, Outputs, PyTree

# The encoder's features that the decoder takes, from the deepest on.
LEVELS = ('features', 'stage3', 'stage2', 'stage1')


class Saliency(NamedTuple):
  """What the saliency net says of a batch.

  Attributes:
    map: f32[B,h,w] in [0,1]; high where the class asked for is.
    exists: f32[B,2], logits of (the class is absent, it is present).
    encoder: logits and taps of the encoder.
  """

  map: Map
  exists: Array
  encoder: Outputs


def pixel_shuffle(x: Array) -> Array:
  """[B,h,w,4F] -> [B,2h,2w,F], channels ordered as in torch: (F, row, column)."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, c // 4, 2, 2)
  return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


class FollowUp(nn.Module):
  """A bottleneck of ratio 4 around a projection with bias; `features` channels out."""

  features: int
  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """[B,H,W,C] -> [B,H,W,features]."""
    inner = self.features // 4
    y = Conv(inner, 1, dtype=self.dtype, name='conv1')(x)
    y = self.act(BatchNorm(self.dtype, name='bn1')(y, train))
    y = Conv(inner, 3, 1, 1, dtype=self.dtype, name='conv2')(y)
    y = self.act(BatchNorm(self.dtype, name='bn2')(y, train))
    y = Conv(self.features, 1, dtype=self.dtype, name='conv3')(y)
    y = BatchNorm(self.dtype, name='bn3')(y, train)
    x = Conv(self.features, 1, use_bias=True, dtype=self.dtype, name='residual_transformer')(x)
    return self.act(y + x)


class UpSample(nn.Module):
  """Doubles the resolution, joins the encoder's features of that size, and mixes them."""

  features: int
  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, passed: Array, train: bool = False) -> Array:
    """[B,h,w,C] and [B,2h,2w,D] -> [B,2h,2w,features]."""
    if (2 * x.shape[1], 2 * x.shape[2]) != passed.shape[1:3]:
      raise InputError(
        f'the encoder brings features of {x.shape[1]}×{x.shape[2]} and {passed.shape[1]}×'
        f'{passed.shape[2]} cells, and each level must halve: take images whose side is a multiple '
        'of 32 px (--image_size)'
      )
    y = Conv(4 * self.features, 3, 1, 1, dtype=self.dtype, name='upsampler.0.0')(x)
    y = self.act(BatchNorm(self.dtype, name='upsampler.0.1')(y, train))
    y = jnp.concatenate([self.act(pixel_shuffle(y)), passed], axis=-1)
    return FollowUp(self.features, self.act, self.dtype, name='follow_up')(y, train)


class SaliencyUnet(nn.Module):
  """Encoder, class selector and decoder.

  Attributes:
    encoder: a net of the zoo; its taps `LEVELS` halve in size from one to the next.
    widths: channels of the up-sampling blocks, deepest first; one per further level.
    num_classes: K, of the selector.
    confidence: subtracted from the class activation before the gate; the higher, the surer the
      selector must be of a class to let it pass.
    act: the activation.
    dtype: of the computation.
  """

  encoder: nn.Module
  widths: Sequence[int]
  num_classes: int
  confidence: float = 0.0
  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Image, y: Label, train: bool = False) -> Saliency:
    """Map and class presence of classes y [B] in normalised images x [B,H,W,3].

    With act = Σ_ch features · embedding(y): exists = (−ē, ē)/2, ē the spatial mean of act, and the
    deepest features are multiplied by sigmoid(act − confidence).
    """
    seen = self.encoder(x)  # its running statistics are held, whether it is trained or not
    levels = [seen.taps[name].astype(jnp.float32) for name in LEVELS if name in seen.taps]
    if self.dtype is not None:
      levels = [v.astype(self.dtype) for v in levels]
    top = levels[0]
    wanted = nn.Embed(self.num_classes, top.shape[-1], name='selector_module')(y)
    activation = jnp.einsum('bhwf,bf->bhw', top, wanted.astype(top.dtype))
    presence = jnp.mean(activation, axis=(1, 2), dtype=jnp.float32)
    h = top * jax.nn.sigmoid(activation - self.confidence)[..., None]
    for i, (features, passed) in enumerate(zip(self.widths, levels[1:], strict=True)):
      name = f'up{len(self.widths) - 1 - i}'
      h = UpSample(features, self.act, self.dtype, name=name)(h, passed, train)
    ab = Conv(2, 1, use_bias=True, dtype=self.dtype, name='to_saliency_chans')(h)
    a, b = jnp.moveaxis(jnp.abs(ab.astype(jnp.float32)), -1, 0)
    exists = jnp.stack([-presence, presence], axis=-1) / 2
    return Saliency(a / (a + b + 1e-12), exists, seen)


def build(
  encoder: str,
  num_classes: int,
  widths: Sequence[int] | None = None,
  confidence: float = 0.0,
  dtype: Any = None,
) -> SaliencyUnet:
  """The saliency net on an encoder of the zoo.

  Default widths: a quarter of the channels that each level brings, 32 at least; for ResNet-50 the
  published 256, 128, 64.
  """
  net = nets.build(encoder, num_classes=num_classes, dtype=dtype)
  taps = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), _ONE_IMAGE)[0].taps)
  passed = [taps[name].shape[-1] for name in LEVELS[1:] if name in taps]
  if widths is None:
    widths = tuple(max(n // 4, 32) for n in passed)
  if len(widths) != len(passed):
    raise InputError(f'--widths has {len(widths)} numbers; {encoder} needs {len(passed)}')
  return SaliencyUnet(net, tuple(widths), num_classes, confidence, dtype=dtype)


def variable_shapes(module: SaliencyUnet) -> PyTree:
  """The shapes of its variables."""
  return jax.eval_shape(module.init, jax.random.key(0), _ONE_IMAGE, _ONE_CLASS)


_ONE_IMAGE = np.zeros((1, 64, 64, 3), np.float32)
_ONE_CLASS = np.zeros(1, np.int32)
