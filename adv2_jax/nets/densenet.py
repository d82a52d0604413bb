"""DenseNet-121/169 as torchvision builds them; module names are torch's, dots included."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from adv2_jax.nets.layers import BatchNorm, Conv
from adv2_jax.nets.resnet import pool_and_project
from adv2_jax.types import Array, Image, Outputs

GROWTH = 32  # channels that each dense layer adds


class DenseLayer(nn.Module):
  """Norm, act, 1×1 convolution to 4·growth; norm, act, 3×3 convolution to growth channels."""

  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """[B,H,W,C] -> [B,H,W,32], to be appended to the input."""
    x = self.act(BatchNorm(self.dtype, name='norm1')(x, train))
    x = Conv(4 * GROWTH, 1, dtype=self.dtype, name='conv1')(x)
    x = self.act(BatchNorm(self.dtype, name='norm2')(x, train))
    return Conv(GROWTH, 3, 1, 1, dtype=self.dtype, name='conv2')(x)


class DenseNet(nn.Module):
  """DenseNet for images of about 224 pixels (Huang et al. 2017, arXiv 1608.06993).

  Attributes:
    blocks: number of dense layers in each dense block.
    num_classes: K.
    act: the activation; `soft_relu` makes the surrogate.
    dtype: of the computation (None: that of the input); logits are always float32.
  """

  blocks: Sequence[int]
  num_classes: int = 1000
  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None

  def setup(self):
    """The head's layer, which `__call__` and `head` share."""
    self.classifier = nn.Dense(self.num_classes)

  @nn.compact
  def __call__(self, x: Image, train: bool = False) -> Outputs:
    """Normalised images [B,H,W,3] -> logits f32[B,K] and taps.

    Taps: stem (stride 2, before the max-pooling), stage1, stage2, stage3 (dense blocks before
    their transition; strides 4, 8, 16) and features (stride 32, after the last norm and act).
    """
    x = Conv(2 * GROWTH, 7, 2, 3, dtype=self.dtype, name='features.conv0')(x)
    x = self.act(BatchNorm(self.dtype, name='features.norm0')(x, train))
    taps = {'stem': x}
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, layers in enumerate(self.blocks, 1):
      for i in range(1, layers + 1):
        name = f'features.denseblock{stage}.denselayer{i}'
        new = DenseLayer(self.act, self.dtype, name=name)(x, train)
        x = jnp.concatenate([x, new], axis=-1)
      if stage < len(self.blocks):
        taps[f'stage{stage}'] = x
        name = f'features.transition{stage}'
        x = self.act(BatchNorm(self.dtype, name=f'{name}.norm')(x, train))
        x = Conv(x.shape[-1] // 2, 1, dtype=self.dtype, name=f'{name}.conv')(x)
        x = nn.avg_pool(x, (2, 2), (2, 2))
    x = taps['features'] = self.act(BatchNorm(self.dtype, name='features.norm5')(x, train))
    return Outputs(self.head(x), taps)

  def head(self, features: Array) -> Array:
    """Logits f32[B,K] of features [B,h,w,F]."""
    return pool_and_project(features, self.classifier)
