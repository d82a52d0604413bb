"""A compact ResNet for the built-in 64×64 scenes: 0.3 M parameters, 27 M multiply-adds an image."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from adv2_jax.nets.layers import BatchNorm, Conv
from adv2_jax.nets.resnet import BasicBlock, pool_and_project
from adv2_jax.types import Array, Image, Outputs


class SceneResNet(nn.Module):
  """Stem and three stages of basic blocks (16, 32, 96 channels; 1, 1, 2 blocks).

  Features are 8×8 at 64 pixels, so a CAM has 8×8 cells; each sees a window of 81 pixels.

  Attributes:
    num_classes: K.
    act: the activation; `soft_relu` makes the surrogate.
    dtype: of the computation (None: that of the input); logits are always float32.
  """

  num_classes: int = 10
  act: Callable[[Array], Array] = nn.relu
  dtype: Any = None

  def setup(self):
    """The head's layer, which `__call__` and `head` share."""
    self.fc = nn.Dense(self.num_classes)

  @nn.compact
  def __call__(self, x: Image, train: bool = False) -> Outputs:
    """Normalised images [B,H,W,3] -> logits f32[B,K] and taps.

    Taps: stem, stage1 (stride 2), stage2 (stride 4) and features (stride 8).
    """
    x = Conv(16, 5, 2, 2, dtype=self.dtype, name='conv1')(x)
    x = self.act(BatchNorm(self.dtype, name='bn1')(x, train))
    taps = {'stem': x}
    for stage, (features, blocks) in enumerate([(16, 1), (32, 1), (96, 2)], 1):
      for i in range(blocks):
        stride = 2 if stage > 1 and i == 0 else 1
        x = BasicBlock(features, stride, self.act, self.dtype, name=f'layer{stage}.{i}')(x, train)
      taps['features' if stage == 3 else f'stage{stage}'] = x
    return Outputs(self.head(x), taps)

  def head(self, features: Array) -> Array:
    """Logits f32[B,K] of features [B,h,w,96]."""
    return pool_and_project(features, self.fc)
