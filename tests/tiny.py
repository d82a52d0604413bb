"""Classifiers small enough to compile in a blink, and what tests of the attack need around them."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adv2_jax.classifier import Classifier, from_fn, from_linen
from adv2_jax.nets import soft_relu
from adv2_jax.types import Batch, Outputs

CLASSES = 5
SIZE = 16


class TinyNet(nn.Module):
  """Two convolutions, global average pooling, a linear head; features are 8×8 at 16 pixels."""

  act: Callable[[jax.Array], jax.Array] = nn.relu
  pools: bool = True

  def setup(self):
    self.conv1 = nn.Conv(8, (3, 3), strides=2, bias_init=nn.initializers.normal(0.2))
    self.conv2 = nn.Conv(6, (3, 3), bias_init=nn.initializers.normal(0.2))
    self.fc = nn.Dense(CLASSES, kernel_init=nn.initializers.normal(1.0))

  def __call__(self, x):
    features = self.act(self.conv2(self.act(self.conv1(x))))
    return Outputs(self.head(features), {'features': features})

  def head(self, features):
    return self.fc(features.mean((1, 2)) if self.pools else features.reshape(len(features), -1) / 8)


@functools.cache
def classifier(seed: int = 0, **fields: Any) -> Classifier:
  """A random `TinyNet`; `pools=False` makes its head flatten, `act` another activation."""
  module = TinyNet(**fields)
  variables = jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, SIZE, SIZE, 3)))
  return from_linen(module, variables, mean=(0.5,) * 3, std=(0.25,) * 3)


outputs = jax.jit(Classifier.__call__)  # op by op it takes longer


def linear_classifier(seed: int = 0, size: int = 4, classes: int = CLASSES) -> Classifier:
  """Logits W·x: the optimum of every attack is known. Its features are x itself."""
  w = np.random.RandomState(seed).randn(size, size, 3, classes).astype(np.float32)

  def head(w, features):
    return jnp.einsum('bhwc,hwck->bk', features, w)

  def apply(w, x, act=None):
    return Outputs(head(w, x), {'features': x})

  return from_fn(w, apply, head, apply)


def counted(clf: Classifier) -> tuple[Classifier, list[int]]:
  """The classifier, and a list that grows by one whenever JAX traces it."""
  traces: list[int] = []

  def counting(fn):
    def call(params, x, *args, **kwargs):
      traces.append(len(x))
      return fn(params, x, *args, **kwargs)

    return call

  def surrogate(params, x, act=soft_relu):
    return counting(clf.surrogate_fn)(params, x, act=act)

  return clf.replace(apply_fn=counting(clf.apply_fn), surrogate_fn=surrogate), traces


def images(n: int, size: int = SIZE, seed: int = 0) -> jax.Array:
  """f32[n,size,size,3] on the 8-bit grid, some pixels at 0 and 1."""
  levels = np.random.RandomState(seed).randint(-20, 276, (n, size, size, 3)).clip(0, 255)
  return jnp.asarray(levels / 255, jnp.float32)


def batch(x: jax.Array, target: Any, target_map: Any = None, **fields: Any) -> Batch:
  """A batch of real rows numbered from 0."""
  n = len(x)
  made = Batch(jnp.arange(n), x, jnp.asarray(target), target_map, jnp.ones(n, bool))
  return made._replace(**fields)
