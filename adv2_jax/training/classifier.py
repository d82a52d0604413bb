"""What training a classifier brings to the loop: a fresh state, its step, its accuracy."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from adv2_jax import images as image_lib
from adv2_jax.training.fit import Augment, Metrics, StepFn, TrainBatch, TrainState, no_augment
from adv2_jax.types import Array, Key, PyTree


def init_state(
  module: nn.Module, tx: optax.GradientTransformation, image_shape: tuple[int, ...], key: Key
) -> TrainState:
  """A fresh state of a zoo net for images of shape (H, W, 3)."""
  variables = jax.jit(module.init)(key, jnp.zeros((1, *image_shape), jnp.float32))
  return TrainState(jnp.int32(0), variables, tx.init(variables['params']))


def classifier_step(
  module: nn.Module,
  tx: optax.GradientTransformation,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  augment: Augment = no_augment,
  label_smoothing: float = 0.0,
) -> StepFn:
  """One step of cross-entropy training; metrics are the batch's mean `loss` and `accuracy`."""

  def step(state: TrainState, batch: TrainBatch, key: Key) -> tuple[TrainState, Metrics]:
    x = image_lib.normalised(augment(key, batch.image.astype(jnp.float32) / 255.0), mean, std)

    def loss_fn(params: PyTree):
      variables = {**state.variables, 'params': params}
      out, changed = module.apply(variables, x, train=True, mutable=['batch_stats'])
      targets = jax.nn.one_hot(batch.label, out.logits.shape[-1])
      targets = optax.smooth_labels(targets, label_smoothing)
      return optax.softmax_cross_entropy(out.logits, targets).mean(), (out.logits, changed)

    params = state.variables['params']
    (loss, (logits, changed)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    variables = {**state.variables, **changed, 'params': optax.apply_updates(params, updates)}
    accuracy = (logits.argmax(-1) == batch.label).mean()
    return TrainState(state.step + 1, variables, opt_state), {'loss': loss, 'accuracy': accuracy}

  return step


def make_evaluate(
  module: nn.Module,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  batch_size: int = 250,
) -> Callable[[PyTree], float]:
  """A function variables -> accuracy on u8[N,H,W,3] images; compiled once."""

  @jax.jit
  def predict(variables: PyTree, image: Array) -> Array:
    out: Any = module.apply(variables, image_lib.normalised(image / np.float32(255), mean, std))
    return out.logits.argmax(-1)

  def evaluate(variables: PyTree) -> float:
    right = 0
    for start in range(0, len(images), batch_size):
      image, label = images[start : start + batch_size], labels[start : start + batch_size]
      fill = ((0, batch_size - len(image)), (0, 0), (0, 0), (0, 0))  # one shape, one compilation
      predicted = np.asarray(predict(variables, np.pad(image, fill)))[: len(label)]
      right += int((predicted == label).sum())
    return right / len(images)

  return evaluate
