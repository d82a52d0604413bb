"""Optax transformations that optax lacks. All are vmapped over examples by the attack loop."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adv2_jax.types import Array, PyTree


class TorchAmsgradState(NamedTuple):
  """Step count, first and second moments, and the running maximum of the raw second moment."""

  step: Array
  mu: PyTree
  nu: PyTree
  nu_max: PyTree


def torch_amsgrad(
  learning_rate: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """Adam(amsgrad=True) as PyTorch computes it: −lr · m̂ / (√(max_s v_s) / √(1−β2ᵗ) + ε).

  Differs from `optax.amsgrad`, which takes the maximum of the bias-corrected moment (optax issue
  1389): early, noisy second moments are inflated there and hold the step down for good.
  """

  def init(params: PyTree) -> TorchAmsgradState:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return TorchAmsgradState(jnp.zeros([], jnp.int32), zeros, zeros, zeros)

  def update(
    grads: PyTree, state: TorchAmsgradState, params: PyTree = None
  ) -> tuple[PyTree, TorchAmsgradState]:
    del params
    step = state.step + 1
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment(grads, state.nu, b2, 2)
    nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)
    m_scale, v_scale = 1 - b1**step, jnp.sqrt(1 - b2**step)
    updates = jax.tree.map(
      lambda m, v: -learning_rate * (m / m_scale) / (jnp.sqrt(v) / v_scale + eps), mu, nu_max
    )
    return updates, TorchAmsgradState(step, mu, nu, nu_max)

  return optax.GradientTransformation(init, update)


def normalise_l1() -> optax.GradientTransformation:
  """g / mean|g|: makes momentum blind to the scale of the loss (Dong et al. 2018, MI-FGSM)."""
  return optax.stateless(lambda g, _: jax.tree.map(lambda v: v / (jnp.mean(jnp.abs(v)) + 1e-20), g))


def sign_momentum(
  learning_rate: optax.ScalarOrSchedule, decay: float = 0.75
) -> optax.GradientTransformation:
  """−α_t · sign(Σ_s decay^{t−s} g_s/mean|g_s|): sign steps with momentum (MI-FGSM)."""
  return optax.chain(
    normalise_l1(),
    optax.trace(decay),
    optax.scale_by_sign(),
    optax.scale_by_learning_rate(learning_rate),
  )


def normalise_l2() -> optax.GradientTransformation:
  """g / ‖g‖₂; 0 stays 0."""

  def unit(v: Array) -> Array:
    largest = jnp.max(jnp.abs(v))
    v = v / jnp.where(largest > 0, largest, 1)  # or the squares of small values would be 0
    return v / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(v))), 1)

  return optax.stateless(lambda g, _: jax.tree.map(unit, g))


def l2_momentum(
  learning_rate: optax.ScalarOrSchedule, decay: float = 0.75
) -> optax.GradientTransformation:
  """−α_t · v/‖v‖₂, v = Σ_s decay^{t−s} g_s/‖g_s‖₂: every step has the same length, for L2 balls.

  Without momentum (decay 0) the step of L2 PGD (Madry et al. 2018).
  """
  return optax.chain(
    normalise_l2(), optax.trace(decay), normalise_l2(), optax.scale_by_learning_rate(learning_rate)
  )


class RestartState(NamedTuple):
  """Step count, and the state of the optimiser that is restarted."""

  step: Array
  inner: PyTree


def restarted(tx: optax.GradientTransformation, at: Sequence[int]) -> optax.GradientTransformation:
  """`tx`, begun anew before each of the steps `at` (from 0): momenta do not outlive a leg."""
  if not at:
    return tx

  def init(params: PyTree) -> RestartState:
    return RestartState(jnp.zeros([], jnp.int32), tx.init(params))

  def update(
    grads: PyTree, state: RestartState, params: PyTree = None
  ) -> tuple[PyTree, RestartState]:
    anew = jnp.any(state.step == jnp.asarray(at, jnp.int32))
    fresh = tx.init(params)
    inner = jax.tree.map(lambda a, b: jnp.where(anew, a, b), fresh, state.inner)
    updates, inner = tx.update(grads, inner, params)
    return updates, RestartState(state.step + 1, inner)

  return optax.GradientTransformation(init, update)
