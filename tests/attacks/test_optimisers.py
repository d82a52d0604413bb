"""Optimisers against PyTorch's recorded trace and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import PARITY

from adv2_jax.attacks import optimisers


def positions(tx, start, grads):
  """Where the parameters stand after each of the given gradients."""

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), grads)[1])()


def test_amsgrad_agrees_with_torch_step_by_step():
  golden = np.load(PARITY / 'amsgrad.npz')
  tx = optimisers.torch_amsgrad(float(golden['lr']))
  trace = positions(tx, jnp.asarray(golden['start']), jnp.asarray(golden['grads']))
  np.testing.assert_allclose(trace, golden['trace'], rtol=1e-5, atol=1e-6)


def test_amsgrad_is_not_optax_s():
  """The golden tells the two apart; else the test above would show nothing."""
  golden = np.load(PARITY / 'amsgrad.npz')
  tx = optax.amsgrad(float(golden['lr']))
  trace = positions(tx, jnp.asarray(golden['start']), jnp.asarray(golden['grads']))
  assert np.abs(trace - golden['trace']).max() > 0.01


def test_sign_momentum_is_the_sign_of_the_decayed_sum_of_scaled_gradients():
  grads = np.random.RandomState(0).randn(7, 3, 2).astype(np.float32)
  grads *= np.logspace(-6, 6, 7, dtype=np.float32).reshape(7, 1, 1)  # scale must not matter
  rate = optax.linear_schedule(0.1, 0.03, 6)
  trace = positions(optimisers.sign_momentum(rate, 0.7), jnp.zeros((3, 2)), jnp.asarray(grads))
  expected, momentum, position = [], 0.0, np.zeros((3, 2))
  for t, g in enumerate(grads.astype(np.float64)):
    momentum = 0.7 * momentum + g / np.abs(g).mean()
    position = position - float(rate(t)) * np.sign(momentum)
    expected.append(position)
  np.testing.assert_allclose(trace, expected, atol=1e-6)


@pytest.mark.parametrize(
  'tx',
  [optimisers.torch_amsgrad(0.1), optimisers.sign_momentum(0.1), optimisers.normalise_l1()],
  ids=['amsgrad', 'sign_momentum', 'normalise_l1'],
)
def test_examples_do_not_see_each_other_under_vmap(tx):
  """Catches a norm or a count that is shared over the batch."""
  grads = jax.random.normal(jax.random.key(0), (4, 3, 5)) * jnp.array([1.0, 1e3, 1e-3]).reshape(
    1, 3, 1
  )
  start = jnp.zeros((3, 5))
  vmapped = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
  together = positions(vmapped, start, grads)
  alone = [positions(tx, start[i], grads[:, i]) for i in range(3)]
  np.testing.assert_allclose(together, np.stack(alone, axis=1), rtol=1e-5)


def test_a_zero_gradient_gives_no_update():
  """0/0 would give NaN: an example whose loss is hinged away has a zero gradient."""
  for tx in (optimisers.torch_amsgrad(0.1), optimisers.sign_momentum(0.1)):
    zero = jnp.zeros((1, 4))
    np.testing.assert_array_equal(positions(tx, jnp.ones(4), zero)[0], np.ones(4))
