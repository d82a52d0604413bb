"""MASK, attacked through its own solver: n of its iterations are made, and differentiated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from adv2_jax.interpreters import masking
from adv2_jax.interpreters.base import Interpreter, one_per_setting
from adv2_jax.interpreters.joint import with_parts
from adv2_jax.interpreters.masking import MaskConfig, MaskState
from adv2_jax.nets.activations import soft_relu
from adv2_jax.types import Array, Image, InputError, Key, Label, Map, PyTree, Unrolled, fold_keys


def shortened(config: MaskConfig, iterations: int) -> MaskConfig:
  """A solver of so few iterations that ends near the same mask: see `masking.fast`."""
  quick = config if config.decay else masking.fast(config)
  return quick._replace(steps=iterations)


@one_per_setting
def unrolled_mask(
  config: MaskConfig | None = None, *, iterations: int = 25, tau: float = 1e-2
) -> Interpreter:
  """MASK as `mask` explains it; the attack moves the map that a shortened solver makes.

      g(x) = 1 − m_n(x),   m_{k+1} = Adam(m_k, ∂l_map/∂m (m_k; x)),   k < n

  Closer than by what `mask` imitates, at 6 n + 2 network passes a step instead of 14. Each
  iteration is computed again on the way back, so memory does not grow with n. The solver's
  gradients are taken from the surrogate, whose ReLU derivative is smooth, as they are
  differentiated once more. Where the target class is sure and survives every blur, the map is
  empty, and has no derivative: the image is not moved for its map. BUILD.md has what it reaches.

  Args:
    config: objective and solver that explain; None: `MaskConfig()`, the settings for 224 px.
    iterations: n.
    tau: width of the smoothed ReLU derivative, form 'smooth', where the classifier's surrogate
      takes `act`.

  Raises:
    InputError: a setting that makes no sense; when traced, one that does not fit the images.
  """
  made = masking.mask(config)
  c = made.settings
  assert isinstance(c, MaskConfig)
  if iterations < 1:
    raise InputError(f'unrolled_mask iterations is {iterations}; expected at least 1')
  quick = shortened(c, iterations)
  act = functools.partial(soft_relu, tau=tau, form='smooth')
  soft_relu(np.float32(0), tau, 'smooth')  # says what is wrong with tau

  def begin(params: PyTree, clf, x: Image, y: Label, target_map: Map, keys: Key) -> tuple[()]:
    del params, clf, y, target_map, keys
    masking.check_fits(c, *x.shape[1:3])
    return ()

  def unroll(params: PyTree, clf, x: Image, y: Label, carry: tuple[()], keys: Key) -> Unrolled:
    del params
    net = functools.partial(clf.surrogate, act=act) if clf.takes_act else clf.surrogate

    @jax.checkpoint
    def iteration(state: MaskState, i: Array) -> tuple[MaskState, None]:
      return masking.solver_step(net, state, x, y, fold_keys(keys, i), quick), None

    state, _ = jax.lax.scan(
      iteration, masking.start(quick, x), jnp.arange(iterations, dtype=jnp.int32)
    )
    nothing = jnp.zeros(len(x), jnp.float32)
    return Unrolled((1 - state.mask)[None], carry, nothing, clf(x).logits)

  return made.replace(
    unroll_fn=unroll,
    begin_fn=begin,
    name='unrolled_mask',
    passes=(made.passes[0], 2 + 6 * iterations, 1 + 2 * iterations),
    begin_passes=0,
  )


def thorough_mask(interpreter: Interpreter) -> Interpreter:
  """The interpreter, with `mask`, alone or in a joint, attacked as `unrolled_mask`."""
  c = interpreter.settings
  if interpreter.name == 'mask' and isinstance(c, MaskConfig):
    return unrolled_mask(c)
  return with_parts(interpreter, thorough_mask)
