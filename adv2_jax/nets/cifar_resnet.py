"""CIFAR ResNet-20/56 with parameter-free shortcuts (option A of He et al. 2016, section 4.2).

Names are those of akamaster/pytorch_resnet_cifar10; the last layer is `linear`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from adv2_jax.nets.layers import BatchNorm, Conv
from adv2_jax.nets.resnet import pool_and_project
from adv2_jax.types import Array, Image, Outputs


class Block(nn.Module):
  """Two 3×3 convolutions around a shortcut that slices by the stride and pads channels by zero."""

  features: int
  stride: int = 1
  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """[B,H,W,C] -> [B,H/stride,W/stride,features]."""
    y = Conv(self.features, 3, self.stride, 1, dtype=self.dtype, name='conv1')(x)
    y = self.act(BatchNorm(self.dtype, name='bn1')(y, train))
    y = Conv(self.features, 3, 1, 1, dtype=self.dtype, name='conv2')(y)
    y = BatchNorm(self.dtype, name='bn2')(y, train)
    pad = (self.features - x.shape[-1]) // 2
    x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (pad, pad)))
    return self.act(y + x)


class CifarResNet(nn.Module):
  """ResNet of 6·`blocks` + 2 layers for images of 32 pixels.

  Attributes:
    blocks: number of blocks in each of the three stages (16, 32, 64 channels).
    num_classes: K.
    act: the activation; `soft_relu` makes the surrogate.
    dtype: of the computation (None: that of the input); logits are always float32.
  """

  blocks: int
  num_classes: int = 10
  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None

  def setup(self):
    """The head's layer, which `__call__` and `head` share."""
    self.linear = nn.Dense(self.num_classes)

  @nn.compact
  def __call__(self, x: Image, train: bool = False) -> Outputs:
    """Normalised images [B,H,W,3] -> logits f32[B,K] and taps.

    Taps: stem, stage1 (stride 1), stage2 (stride 2) and features (stride 4).
    """
    x = Conv(16, 3, 1, 1, dtype=self.dtype, name='conv1')(x)
    x = self.act(BatchNorm(self.dtype, name='bn1')(x, train))
    taps = {'stem': x}
    for stage, features in enumerate((16, 32, 64), 1):
      for i in range(self.blocks):
        stride = 2 if stage > 1 and i == 0 else 1
        x = Block(features, stride, self.act, self.dtype, name=f'layer{stage}.{i}')(x, train)
      taps['features' if stage == 3 else f'stage{stage}'] = x
    return Outputs(self.head(x), taps)

  def head(self, features: Array) -> Array:
    """Logits f32[B,K] of features [B,h,w,64]."""
    return pool_and_project(features, self.linear)
