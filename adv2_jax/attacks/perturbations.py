"""Perturbation sets P(x0): how an image is made from `delta`, and what keeps it in the set."""

import math

import jax
import jax.numpy as jnp

from adv2_jax.images import flow_smoothness, warp
from adv2_jax.types import Array, Image, InputError, Key, Perturbation

_NEARLY_ONE = 1 - 1e-6  # the tanh that stands for a pixel at 0 or 1


def _rounded(x: Image, levels: int | None) -> Image:
  """On a grid of so many levels; gradients pass straight through."""
  return x if levels is None else x + jax.lax.stop_gradient(jnp.round(x * levels) / levels - x)


def _per_example(epsilon: float | Array) -> float | Array:
  return jnp.reshape(epsilon, (-1, 1, 1, 1)) if jnp.ndim(epsilon) else epsilon


def _no_penalty(delta: Array) -> Array:
  return jnp.zeros(len(delta), jnp.float32)


def linf_ball(
  epsilon: float | Array, *, random_start: bool = False, levels: int | None = None
) -> Perturbation:
  """‖x − x0‖∞ ≤ ε and x ∈ [0,1]; delta = x − x0, f32[B,H,W,C].

  Args:
    epsilon: radius in units of the image range, 0 < ε ≤ 1, one number or one per example, [B];
      authors: 0.031.
    random_start: start uniformly in the ball instead of at x0.
    levels: 255 makes `apply` round the image to the 8-bit grid and pass gradients straight through,
      so that what the attack evaluates is the very image it will deliver. None: no rounding.
  """
  epsilon = _per_example(epsilon)

  def init(x0: Image, keys: Key) -> Array:
    if not random_start:
      return jnp.zeros_like(x0)
    draw = lambda k: jax.random.uniform(k, x0.shape[1:], jnp.float32, -1, 1)  # noqa: E731
    noise = jax.vmap(draw)(keys)
    return project(x0, epsilon * noise)

  def apply(x0: Image, delta: Array) -> Image:
    return _rounded(jnp.clip(x0 + delta, 0, 1), levels)

  def project(x0: Image, delta: Array) -> Array:
    return jnp.clip(x0 + jnp.clip(delta, -epsilon, epsilon), 0, 1) - x0

  return Perturbation(init, apply, project, _no_penalty)


def l2_ball(epsilon: float | Array, *, levels: int | None = None) -> Perturbation:
  """‖x − x0‖₂ ≤ ε and x ∈ [0,1]; delta = x − x0, f32[B,H,W,C].

  The projection is onto the ball, then onto [0,1], which leads no further out; where no pixel
  leaves [0,1] that is the nearest point.

  Args:
    epsilon: radius over all pixels and channels of the image in [0,1], ε > 0, one number or one per
      example, [B]. At 8 bits one level in every value is √(HWC)/255: .43 at 64 px, 1.5 at 224.
    levels: as in `linf_ball`; rounding may lead out by 0.5/255 · √(HWC) at most.
  """
  epsilon = _per_example(epsilon)

  def apply(x0: Image, delta: Array) -> Image:
    return _rounded(jnp.clip(x0 + delta, 0, 1), levels)

  def project(x0: Image, delta: Array) -> Array:
    norm = jnp.sqrt(jnp.sum(jnp.square(delta), (1, 2, 3), keepdims=True))
    delta = delta * jnp.minimum(1, epsilon / jnp.maximum(norm, 1e-12))
    return jnp.clip(x0 + delta, 0, 1) - x0

  return Perturbation(lambda x0, keys: jnp.zeros_like(x0), apply, project, _no_penalty)


def in_radii(ball: Perturbation, epsilon: float | Array) -> Perturbation:
  """The same set with delta in units of its radius, so that a step is a share of ε, of each [B]."""
  epsilon = _per_example(epsilon)
  return Perturbation(
    lambda x0, keys: ball.init(x0, keys) / epsilon,
    lambda x0, delta: ball.apply(x0, epsilon * delta),
    lambda x0, delta: ball.project(x0, epsilon * delta) / epsilon,
    lambda delta: ball.penalty(epsilon * delta),
    ball.price,
    lambda x0, x: ball.invert(x0, x) / epsilon,
  )


def l2_tanh(*, levels: int | None = None) -> Perturbation:
  """x = (tanh w + 1)/2, so all of [0,1], priced at ‖x − x0‖₂²; delta = w, f32[B,H,W,C].

  The change of variables of Carlini & Wagner 2017: there is no bound but the price, and so nothing
  to project. A pixel at 0 or 1 starts 5e-7 inside, where tanh still has a derivative.

  Args:
    levels: as in `linf_ball`.
  """

  def init(x0: Image, keys: Key) -> Array:
    del keys
    return jnp.arctanh((2 * x0 - 1) * _NEARLY_ONE)

  def apply(x0: Image, delta: Array) -> Image:
    del x0
    return _rounded((jnp.tanh(delta) + 1) / 2, levels)

  def price(x0: Image, x: Image) -> Array:
    return jnp.sum(jnp.square(x - x0), (1, 2, 3))

  return Perturbation(init, apply, lambda x0, delta: delta, _no_penalty, price)


def flow_field(tau: float = 0.0005, *, levels: int | None = None) -> Perturbation:
  """x = x0 warped by a flow, penalised by τ · its roughness; delta = the flow, f32[B,H,W,2].

  StAdv (Xiao et al. 2018): pixels move, by `images.warp`, instead of changing colour. Nothing
  bounds the flow but τ · `images.flow_smoothness`. It starts uniform in ±0.1 pixels, as published.

  Args:
    tau: weight of the penalty, τ > 0; authors: 0.0005.
    levels: as in `linf_ball`.

  Raises:
    InputError: a τ that is not positive.
  """
  if not 0 < tau < math.inf:
    raise InputError(
      f"flow_field tau is {tau}; expected a positive weight of the flow's roughness, such as 0.0005"
    )

  def init(x0: Image, keys: Key) -> Array:
    shape = (*x0.shape[1:3], 2)
    return jax.vmap(lambda k: jax.random.uniform(k, shape, jnp.float32, -0.1, 0.1))(keys)

  def apply(x0: Image, delta: Array) -> Image:
    return _rounded(jnp.clip(warp(x0, delta), 0, 1), levels)

  return Perturbation(
    init, apply, lambda x0, delta: delta, lambda delta: tau * flow_smoothness(delta)
  )
