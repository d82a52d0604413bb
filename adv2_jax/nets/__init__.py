"""The zoo: Linen nets, each with a field `act` and a method `head`; NHWC.

Every net maps normalised images f32[B,H,W,3] to `Outputs(logits, taps)`. Weights:
`adv2_jax.weights.zoo`; a ready classifier: `adv2_jax.load_classifier`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from adv2_jax.nets.activations import soft_relu
from adv2_jax.nets.cifar_resnet import CifarResNet
from adv2_jax.nets.densenet import DenseNet
from adv2_jax.nets.resnet import BasicBlock, Bottleneck, ResNet
from adv2_jax.nets.scene_resnet import SceneResNet
from adv2_jax.types import InputError

__all__ = ['DEFAULTS', 'ZOO', 'NetDefaults', 'build', 'soft_relu']


class NetDefaults(NamedTuple):
  """What a net was designed for.

  Attributes:
    num_classes: K.
    image_size: side in pixels.
    head: name of its last layer, as in its checkpoints.
  """

  num_classes: int
  image_size: int
  head: str


ZOO: dict[str, Callable[..., nn.Module]] = {
  'resnet18': functools.partial(ResNet, (2, 2, 2, 2), BasicBlock),
  'resnet34': functools.partial(ResNet, (3, 4, 6, 3), BasicBlock),
  'resnet50': functools.partial(ResNet, (3, 4, 6, 3), Bottleneck),
  'resnet101': functools.partial(ResNet, (3, 4, 23, 3), Bottleneck),
  'densenet121': functools.partial(DenseNet, (6, 12, 24, 16)),
  'densenet169': functools.partial(DenseNet, (6, 12, 32, 32)),
  'cifar_resnet20': functools.partial(CifarResNet, 3),
  'cifar_resnet56': functools.partial(CifarResNet, 9),
  'scene_resnet': SceneResNet,
}

DEFAULTS: dict[str, NetDefaults] = {
  'resnet18': NetDefaults(1000, 224, 'fc'),
  'resnet34': NetDefaults(1000, 224, 'fc'),
  'resnet50': NetDefaults(1000, 224, 'fc'),
  'resnet101': NetDefaults(1000, 224, 'fc'),
  'densenet121': NetDefaults(1000, 224, 'classifier'),
  'densenet169': NetDefaults(1000, 224, 'classifier'),
  'cifar_resnet20': NetDefaults(10, 32, 'linear'),
  'cifar_resnet56': NetDefaults(10, 32, 'linear'),
  'scene_resnet': NetDefaults(10, 64, 'fc'),
}


def build(name: str, **fields: Any) -> nn.Module:
  """The zoo's net of that name; fields (num_classes, act, dtype) replace its defaults.

  Raises:
    InputError: the zoo has no such net; the message lists those it has.
  """
  if name not in ZOO:
    raise InputError(f'unknown model {name!r}; expected one of {", ".join(ZOO)}')
  return ZOO[name](**fields)
