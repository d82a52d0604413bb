"""Back-propagation interpreters: GRAD, input × gradient, integrated gradients, SmoothGrad.

Each is one formula over `input_gradient`. `explain` runs the real net; inside the attack the same
formula runs on the classifier's surrogate, whose ReLU derivative is smooth, because the second
derivative of a ReLU net is zero almost everywhere.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adv2_jax import losses
from adv2_jax.interpreters.base import (
  Interpreter,
  avg_pool,
  class_logit,
  from_map,
  input_gradient,
  min_max,
  one_per_setting,
)
from adv2_jax.nets.activations import soft_relu
from adv2_jax.types import Array, Image, InputError, Key, Label, Map, PyTree

Forward = Callable[[Image], Array]
# (forward, x, y, keys) -> (map, logits)
Formula = Callable[[Forward, Image, Label, Key], tuple[Map, Array]]


def _smoothed(
  formula: Formula,
  name: str,
  passes: tuple[int, int] | tuple[int, int, int],
  tau: float,
  form: str,
  random: bool = False,
) -> Interpreter:
  """The interpreter that evaluates `formula` on the net, and attacks it on the surrogate."""
  if tau <= 0:
    raise InputError(f'tau is {tau}; expected a positive smoothing width, such as 1e-4')
  if form not in ('printed', 'smooth'):
    raise InputError(f"form is {form!r}; expected 'printed' or 'smooth'")
  default = tau == 1e-4 and form == 'printed'
  act = soft_relu if default else functools.partial(soft_relu, tau=tau, form=form)

  def explain(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> tuple[Map, Array]:
    del params
    return formula(lambda v: clf(v).logits, x, y, keys)

  def attacked(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> tuple[Map, Array]:
    del params
    return formula(lambda v: clf.surrogate(v, act).logits, x, y, keys)

  return from_map(explain, attacked, name=name, passes=passes, random=random)


@one_per_setting
def grad(
  pool: int = 4,
  tau: float = 1e-4,
  form: Literal['printed', 'smooth'] = 'printed',
  of: Literal['nll', 'logit'] = 'nll',
) -> Interpreter:
  """GRAD: m = minmax(pool(max_ch |∂s/∂x|)) with s = −log p_y or the logit z_y (Simonyan 2014).

  For −log p_y the derivative of u = log((1 − p_y)/p_y) is used: ∂(−log p_y) = (1 − p_y) ∂u, and
  min-max cancels the positive factor, so the map is the same, without underflow as p_y → 1.

  Args:
    pool: side of the averaged cells, in pixels (4 at 224 px, 2 at 32 px).
    tau: width of the smoothed ReLU derivative, in the attack only.
    form: 'printed' is the paper's (it jumps at 0), 'smooth' is (1 + z/√(z²+τ))/2.
    of: what is differentiated.

  Differs from the authors' code: one derivative, by x in [0,1], both in the attack and in the
  score (theirs attacks ∂/∂(normalised x) and scores ∂/∂x).
  """
  if of not in ('nll', 'logit'):
    raise InputError(f"of is {of!r}; expected 'nll' or 'logit'")

  def formula(forward: Forward, x: Image, y: Label, keys: Key) -> tuple[Map, Array]:
    del keys
    score = losses.log_odds if of == 'nll' else class_logit
    g, logits = input_gradient(forward, x, lambda logits: score(logits, y))
    return min_max(avg_pool(jnp.max(jnp.abs(g), axis=-1), pool)), logits

  return _smoothed(formula, 'grad', (2, 4), tau, form)


@one_per_setting
def input_x_gradient(pool: int = 4, tau: float = 1e-4) -> Interpreter:
  """Input × gradient: m = minmax(pool(|Σ_ch x · ∂z_y/∂x|)) (Shrikumar et al. 2016)."""

  def formula(forward: Forward, x: Image, y: Label, keys: Key) -> tuple[Map, Array]:
    del keys
    g, logits = input_gradient(forward, x, lambda logits: class_logit(logits, y))
    return min_max(avg_pool(jnp.abs(jnp.sum(x * g, axis=-1)), pool)), logits

  return _smoothed(formula, 'input_x_gradient', (2, 4), tau, 'printed')


@one_per_setting
def integrated_gradients(pool: int = 4, steps: int = 16, tau: float = 1e-4) -> Interpreter:
  """Integrated gradients from a black image (Sundararajan et al. 2017).

  m = minmax(pool(|Σ_ch x · (1/n) Σ_k ∂z_y/∂x at ((k − ½)/n) x|)), the midpoint rule with n = steps.
  """
  if steps < 1:
    raise InputError(f'steps is {steps}; expected at least 1 point on the path')

  def formula(forward: Forward, x: Image, y: Label, keys: Key) -> tuple[Map, Array]:
    del keys
    attribution = jnp.sum(path_attribution(forward, x, y, steps), axis=-1)
    return min_max(avg_pool(jnp.abs(attribution), pool)), forward(x)

  passes = (2 * steps, 6 * steps + 2, 2 * steps + 1)  # the logits cost one more
  return _smoothed(formula, 'integrated_gradients', passes, tau, 'printed')


def path_attribution(forward: Forward, x: Image, y: Label, steps: int) -> Array:
  """Signed integrated gradients, f32[B,H,W,C]; they sum to z_y(x) − z_y(0) as steps grow."""

  @jax.checkpoint  # one point's activations at a time, also when differentiated
  def add(total: Array, alpha: Array) -> tuple[Array, None]:
    g, _ = input_gradient(forward, alpha * x, lambda logits: class_logit(logits, y))
    return total + g, None

  alphas = (jnp.arange(steps, dtype=jnp.float32) + 0.5) / steps
  total, _ = jax.lax.scan(add, jnp.zeros_like(x), alphas)
  return x * total / steps


@one_per_setting
def smooth_grad(
  pool: int = 4, samples: int = 8, sigma: float = 0.1, tau: float = 1e-4
) -> Interpreter:
  """SmoothGrad: GRAD's max_ch |∂z_y/∂x| averaged over noisy images x + N(0, σ²) (Smilkov 2017).

  The noise of an example comes from its key alone. `sigma` is in units of the image range.
  """
  if samples < 1 or sigma < 0:
    raise InputError(f'samples={samples}, sigma={sigma}; expected samples ≥ 1 and sigma ≥ 0')

  def formula(forward: Forward, x: Image, y: Label, keys: Key) -> tuple[Map, Array]:
    @jax.checkpoint
    def add(total: Array, i: Array) -> tuple[Array, None]:
      draw = lambda k: jax.random.normal(jax.random.fold_in(k, i), x.shape[1:], jnp.float32)  # noqa: E731
      noisy = x + sigma * jax.vmap(draw)(keys)
      g, _ = input_gradient(forward, noisy, lambda logits: class_logit(logits, y))
      return total + jnp.max(jnp.abs(g), axis=-1), None

    total, _ = jax.lax.scan(
      add, jnp.zeros(x.shape[:-1], jnp.float32), jnp.arange(samples, dtype=jnp.int32)
    )
    return min_max(avg_pool(total / samples, pool)), forward(x)

  passes = (2 * samples, 6 * samples + 2, 2 * samples + 1)
  return _smoothed(formula, 'smooth_grad', passes, tau, 'printed', random=True)
