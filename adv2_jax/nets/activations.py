"""Activations with a smooth derivative in the backward pass, so that GRAD's map can be derived.

`soft_relu` stands for ReLU; `softened` makes the same of every activation with kinks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from adv2_jax.types import Array, InputError, widened

FORMS = ('printed', 'smooth')


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def soft_relu(z: Array, tau: float = 1e-4, form: str = 'printed') -> Array:
  """max(z, 0) exactly, with the derivative h(z) in place of the step function.

  With r = z/√(z²+τ) (Zhang et al. 2020, arXiv 1812.00891, section 4.2):

      printed:  h(z) = 1 + r for z < 0, r for z ≥ 0      (jumps from 1 to 0 at 0)
      smooth:   h(z) = (1 + r) / 2

  The second derivative is the closed form h'(z) = τ/(z²+τ)^{3/2}, half that for `smooth`; the jump
  of the printed form has no part in it.

  Args:
    z: any shape, any float dtype.
    tau: width of the transition, > 0; in units of z².
    form: 'printed' or 'smooth'.

  Returns:
    As `jax.nn.relu(z)`, bit for bit.

  Raises:
    InputError: tau is not positive, or the form is unknown.
  """
  _check(tau, form)
  return jnp.maximum(z, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def soft_step(z: Array, tau: float, form: str) -> Array:
  """h(z) of `soft_relu`; its own derivative is the closed form, which cannot cancel at large z."""
  wide = widened(z)
  r = wide * jax.lax.rsqrt(wide * wide + tau)
  return ((1 + r) / 2 if form == 'smooth' else jnp.where(z < 0, 1 + r, r)).astype(z.dtype)


@soft_step.defjvp
def _soft_step_jvp(tau, form, primals, tangents):
  (z,), (dz,) = primals, tangents
  wide = widened(z)
  slope = tau * jax.lax.rsqrt(wide * wide + tau) ** 3 * (0.5 if form == 'smooth' else 1.0)
  return soft_step(z, tau, form), (slope * widened(dz)).astype(z.dtype)


@soft_relu.defjvp
def _soft_relu_jvp(tau, form, primals, tangents):
  (z,), (dz,) = primals, tangents
  # The primal is soft_relu again, not maximum: an outer derivative must see h here too.
  return soft_relu(z, tau, form), soft_step(z, tau, form) * dz


def _check(tau: float, form: str) -> None:
  if not tau > 0:
    raise InputError(f'tau is {tau}; expected a positive number, such as 1e-4')
  if form not in FORMS:
    raise InputError(f'form is {form!r}; expected one of {", ".join(map(repr, FORMS))}')


# --- surrogates of other activations --------------------------------------------------------------

Activation = Callable[[Array], Array]

_REACH, _STEP, _NEAR = 32.0, 1 / 16, 1e-4
_MOST = 16  # kinks; one with more, such as a sawtooth, is no sum of a few ReLUs


def is_relu(act: Activation) -> bool:
  """Whether act(z) = max(z, 0)."""
  z = np.array([-1e4, -3.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 7.0, 40.0, 1e4], np.float32)
  with jax.ensure_compile_time_eval():
    return bool((np.asarray(act(jnp.asarray(z))) == np.maximum(z, 0)).all())


def kinks(act: Activation) -> tuple[tuple[float, float], ...] | None:
  """The places t where an elementwise activation's slope jumps, each with the jump c.

  () for a smooth one, such as GELU. None where none can be told: the function jumps itself, has
  more than 16 kinks, or is not elementwise. Found on a grid over [−32, 32].
  """
  try:
    return _kinks(act)
  except TypeError:  # not hashable
    return _kinks.__wrapped__(act)


@functools.lru_cache(maxsize=256)
def _kinks(act: Activation) -> tuple[tuple[float, float], ...] | None:
  @jax.jit
  def value_and_slope(z: Array) -> tuple[Array, Array]:
    value, by_z = jax.vjp(act, z)
    return value, by_z(jnp.ones_like(value))[0]

  def at(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with jax.ensure_compile_time_eval():
      value, slope = value_and_slope(jnp.asarray(z, jnp.float32))
    return np.asarray(value, np.float64), np.asarray(slope, np.float64)

  def change(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return sum(np.abs(v - u) for u, v in zip(at(a), at(b), strict=True))

  ends = np.arange(-_REACH, _REACH + _STEP, _STEP) + 0.0123  # off the round numbers
  low, high = ends[:-1], ends[1:]
  try:
    if is_relu(act):
      return ((0.0, 1.0),)
    if at(low)[0].shape != low.shape:
      return None
    while high[0] - low[0] > 1e-6:  # each interval keeps the half where more happens
      middle = (low + high) / 2
      left = change(low, middle) > change(middle, high)
      low, high = np.where(left, low, middle), np.where(left, middle, high)
    t = np.round((low + high) / 2, 5) + 0.0  # no −0
    (v0, s0), (v1, s1), (v2, s2), (v3, s3) = (at(t + i * _NEAR) for i in (-3, -1, 1, 3))
  except Exception:  # whatever a function that is no elementwise activation says
    return None
  # What happens within ±_NEAR of t, less what goes on beside it: curvature, steepness.
  beside = np.abs(s3 - s2) + np.abs(s1 - s0)
  jump = s2 - s1 - (s3 - s2 + s1 - s0) / 2
  torn = np.abs(v2 - v1 - _NEAR * (s1 + s2)) > 1e-2 * np.maximum(1, np.abs(v3 - v0))
  kinked = np.abs(jump) > 5e-3 * np.maximum(1, np.abs(s1) + np.abs(s2))
  found = {float(a): float(b) for a, b in zip(t[kinked], jump[kinked], strict=True)}
  if torn.any() or (kinked & (beside > 0.1 * np.abs(jump))).any() or len(found) > _MOST:
    return None
  return tuple(found.items())


def softened(act: Activation, soft: Activation = soft_relu) -> Activation:
  """The activation with its kinks smoothed as `soft` smooths that of ReLU; values stay as they are.

      act(z) + Σ_k c_k · (soft(z − t_k) − max(z − t_k, 0)),   (t_k, c_k) = kinks(act)

  ReLU becomes `soft`; one without kinks, or whose kinks cannot be told, stays as it is.
  """
  found = kinks(act)
  if not found:
    return act
  if is_relu(act):
    return soft

  def smooth(z: Array) -> Array:
    terms = (c * (soft(z - t) - jax.nn.relu(z - t)) for t, c in found)
    return act(z) + functools.reduce(jnp.add, terms)

  smooth.softened = True  # type: ignore[attr-defined]  # a block may hand it on to blocks within
  return smooth
