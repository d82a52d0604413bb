"""Perturbation sets P(x0): how an image is made from `delta`, and what keeps it in the set."""

import jax
import jax.numpy as jnp

from adv2_jax.types import Array, Image, Key, Perturbation


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
  if jnp.ndim(epsilon):
    epsilon = jnp.reshape(epsilon, (-1, 1, 1, 1))

  def init(x0: Image, keys: Key) -> Array:
    if not random_start:
      return jnp.zeros_like(x0)
    draw = lambda k: jax.random.uniform(k, x0.shape[1:], jnp.float32, -1, 1)  # noqa: E731
    noise = jax.vmap(draw)(keys)
    return project(x0, epsilon * noise)

  def apply(x0: Image, delta: Array) -> Image:
    x = jnp.clip(x0 + delta, 0, 1)
    return x if levels is None else x + jax.lax.stop_gradient(jnp.round(x * levels) / levels - x)

  def project(x0: Image, delta: Array) -> Array:
    return jnp.clip(x0 + jnp.clip(delta, -epsilon, epsilon), 0, 1) - x0

  return Perturbation(init, apply, project, lambda delta: jnp.zeros(len(delta), jnp.float32))
