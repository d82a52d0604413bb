"""ReLU whose backward pass has a smooth derivative, so that GRAD's map can be differentiated."""

import functools

import jax
import jax.numpy as jnp

from adv2_jax.types import Array, InputError

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
  r = z * jax.lax.rsqrt(z * z + tau)
  return (1 + r) / 2 if form == 'smooth' else jnp.where(z < 0, 1 + r, r)


@soft_step.defjvp
def _soft_step_jvp(tau, form, primals, tangents):
  (z,), (dz,) = primals, tangents
  slope = tau * jax.lax.rsqrt(z * z + tau) ** 3
  return soft_step(z, tau, form), (slope / 2 if form == 'smooth' else slope) * dz


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
