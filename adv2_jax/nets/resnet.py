"""ResNet-18/34/50/101 as torchvision builds them (v1.5: the stride sits in the 3×3 convolution).

Module names are torch's, dots included (`layer1.0`, `downsample.1`), so that a parameter's path is
its name in a torchvision checkpoint; see `adv2_jax.weights.zoo`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from adv2_jax.nets.layers import BatchNorm, Conv
from adv2_jax.types import Array, Image, Outputs


def pool_and_project(features: Array, classify: nn.Dense) -> Array:
  """Global average pooling and a linear layer: [B,h,w,F] -> f32[B,K], always in float32."""
  return classify(features.astype(jnp.float32).mean((1, 2)))


class BasicBlock(nn.Module):
  """Two 3×3 convolutions around a shortcut; `features` channels out."""

  features: int
  stride: int = 1
  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None
  expansion = 1

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """[B,H,W,C] -> [B,H/stride,W/stride,features]."""
    y = Conv(self.features, 3, self.stride, 1, dtype=self.dtype, name='conv1')(x)
    y = self.act(BatchNorm(self.dtype, name='bn1')(y, train))
    y = Conv(self.features, 3, 1, 1, dtype=self.dtype, name='conv2')(y)
    y = BatchNorm(self.dtype, name='bn2')(y, train)
    return self.act(y + shortcut(x, self.features, self.stride, self.dtype, train))


class Bottleneck(nn.Module):
  """1×1, 3×3 (with the stride), 1×1 convolutions around a shortcut; 4·`features` channels out."""

  features: int
  stride: int = 1
  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None
  expansion = 4

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """[B,H,W,C] -> [B,H/stride,W/stride,4·features]."""
    out = self.features * self.expansion
    y = Conv(self.features, 1, dtype=self.dtype, name='conv1')(x)
    y = self.act(BatchNorm(self.dtype, name='bn1')(y, train))
    y = Conv(self.features, 3, self.stride, 1, dtype=self.dtype, name='conv2')(y)
    y = self.act(BatchNorm(self.dtype, name='bn2')(y, train))
    y = Conv(out, 1, dtype=self.dtype, name='conv3')(y)
    y = BatchNorm(self.dtype, name='bn3')(y, train)
    return self.act(y + shortcut(x, out, self.stride, self.dtype, train))


def shortcut(x: Array, features: int, stride: int, dtype: Any, train: bool) -> Array:
  """The identity, or a strided 1×1 projection where the shape changes; call inside a block."""
  if stride == 1 and x.shape[-1] == features:
    return x
  x = Conv(features, 1, stride, dtype=dtype, name='downsample.0')(x)
  return BatchNorm(dtype, name='downsample.1')(x, train)


class ResNet(nn.Module):
  """ResNet for images of about 224 pixels (He et al. 2016, arXiv 1512.03385).

  Attributes:
    blocks: number of blocks in each stage.
    block: `BasicBlock` or `Bottleneck`.
    num_classes: K.
    act: the activation; `soft_relu` makes the surrogate.
    dtype: of the computation (None: that of the input); logits are always float32.
  """

  blocks: Sequence[int]
  block: Callable[..., nn.Module]
  num_classes: int = 1000
  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None

  def setup(self):
    """The head's layer, which `__call__` and `head` share."""
    self.fc = nn.Dense(self.num_classes)

  @nn.compact
  def __call__(self, x: Image, train: bool = False) -> Outputs:
    """Normalised images [B,H,W,3] -> logits f32[B,K] and taps.

    Taps: stem (stride 2, before the max-pooling), stage1, stage2, stage3 (strides 4, 8, 16) and
    features (stride 32).
    """
    x = Conv(64, 7, 2, 3, dtype=self.dtype, name='conv1')(x)
    x = self.act(BatchNorm(self.dtype, name='bn1')(x, train))
    taps = {'stem': x}
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, blocks in enumerate(self.blocks, 1):
      for i in range(blocks):
        stride = 2 if stage > 1 and i == 0 else 1
        block = self.block(
          64 * 2 ** (stage - 1), stride, self.act, self.dtype, name=f'layer{stage}.{i}'
        )
        x = block(x, train)
      taps['features' if stage == len(self.blocks) else f'stage{stage}'] = x
    return Outputs(self.head(x), taps)

  def head(self, features: Array) -> Array:
    """Logits f32[B,K] of features [B,h,w,F]."""
    return pool_and_project(features, self.fc)
