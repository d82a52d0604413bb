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
  [
    optimisers.torch_amsgrad(0.1),
    optimisers.sign_momentum(0.1),
    optimisers.normalise_l1(),
    optimisers.l2_momentum(0.1),
    optimisers.restarted(optimisers.torch_amsgrad(0.1), [2]),
  ],
  ids=['amsgrad', 'sign_momentum', 'normalise_l1', 'l2_momentum', 'restarted'],
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
  steps = (optimisers.torch_amsgrad, optimisers.sign_momentum, optimisers.l2_momentum)
  for tx in (make(0.1) for make in steps):
    zero = jnp.zeros((1, 4))
    np.testing.assert_array_equal(positions(tx, jnp.ones(4), zero)[0], np.ones(4))


def test_l2_steps_have_the_same_length_and_follow_the_decayed_sum_of_unit_gradients():
  grads = np.random.RandomState(0).randn(6, 3, 2).astype(np.float32)
  grads *= np.logspace(-30, 8, 6, dtype=np.float32).reshape(6, 1, 1)  # scale must not matter
  trace = positions(optimisers.l2_momentum(0.1, 0.5), jnp.zeros((3, 2)), jnp.asarray(grads))
  momentum, position, expected = 0.0, np.zeros((3, 2)), []
  for g in grads.astype(np.float64):
    momentum = 0.5 * momentum + g / np.linalg.norm(g)
    position = position - 0.1 * momentum / np.linalg.norm(momentum)
    expected.append(position)
  np.testing.assert_allclose(trace, expected, atol=1e-6)


def test_a_restarted_optimiser_is_a_new_one_after_each_of_its_steps():
  grads = jnp.asarray(np.random.RandomState(0).randn(7, 4), jnp.float32)
  make = lambda: optimisers.torch_amsgrad(0.1)  # noqa: E731
  found = positions(optimisers.restarted(make(), [2, 5]), jnp.zeros(4), grads)
  at, expected = jnp.zeros(4), []
  for leg in (grads[:2], grads[2:5], grads[5:]):
    expected.append(positions(make(), at, leg))
    at = expected[-1][-1]
  np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-6)
  assert np.abs(found - positions(make(), jnp.zeros(4), grads)).max() > 0.01
