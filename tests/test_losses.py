"""Losses against closed forms in float64, at margins where the naive formulas fail in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from adv2_jax import losses

MARGINS = [-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0]


def logits_with_margin(margin, k=4, target=1):
  """Rows whose target leads the others by −margin (f64)."""
  z = np.linspace(-0.7, 0.0, k)
  z[target] = 0.0
  others = np.delete(z, target)
  z[target] = others.max() - margin
  return z[None]


def numeric_log_odds(z, t):
  return logsumexp(np.delete(z, t, axis=-1), axis=-1) - z[..., t]


@pytest.mark.parametrize('u', MARGINS)
def test_xent_has_no_cancellation(u):
  """−log_softmax in float32 is exactly 0 from a margin of 17 on, and so is its gradient."""
  z, t = logits_with_margin(u), np.array([1])
  expected = np.logaddexp(0, numeric_log_odds(z, 1))
  value, g = jax.value_and_grad(lambda v: losses.targeted_xent(v, t)[0])(jnp.float32(z))
  np.testing.assert_allclose(value, expected[0], rtol=2e-5)
  odds = numeric_log_odds(z, 1)
  weights = np.exp(z - logsumexp(np.delete(z, 1, axis=-1)))  # p_j / Σ_{j≠t} p_j
  weights[:, 1] = -1
  np.testing.assert_allclose(g, weights / (1 + np.exp(-odds)), rtol=2e-5)


@pytest.mark.parametrize('u', MARGINS)
def test_log_odds_is_log_of_the_odds_and_its_gradient_never_vanishes(u):
  z, t = logits_with_margin(u), np.array([1])
  log_p = log_softmax(z, axis=-1)
  log_not_p = logsumexp(np.delete(log_p, 1, axis=-1), axis=-1)
  value, g = jax.value_and_grad(lambda v: losses.log_odds(v, t)[0])(jnp.float32(z))
  np.testing.assert_allclose(value, (log_not_p - log_p[:, 1])[0], rtol=1e-5, atol=1e-6)
  assert float(g[0, 1]) == -1
  np.testing.assert_allclose(np.delete(np.asarray(g), 1).sum(), 1, rtol=1e-6)


@given(z=st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5), t=st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_closed_forms(z, t):
  z, target = np.asarray(z, np.float32)[None], np.array([t])
  others = np.delete(z.astype(np.float64), t, axis=-1)
  np.testing.assert_allclose(
    losses.margin(z, target), others.max(-1) - z[:, t], rtol=1e-6, atol=1e-6
  )
  log_p = log_softmax(z.astype(np.float64), axis=-1)
  np.testing.assert_allclose(losses.targeted_xent(z, target), -log_p[:, t], rtol=1e-5, atol=1e-5)
  smooth = -0.95 * log_p[:, t] - 0.05 / 4 * np.delete(log_p, t, axis=-1).sum(-1)
  np.testing.assert_allclose(losses.smoothed_xent(0.95)(z, target), smooth, rtol=1e-5, atol=1e-5)


def test_smoothed_xent_is_least_at_its_confidence():
  """Its gradient is 0 where p_t = confidence and the rest is spread evenly."""
  p = np.array([[0.95, 0.0125, 0.0125, 0.0125, 0.0125]])
  g = jax.grad(lambda z: losses.smoothed_xent(0.95)(z, jnp.array([0]))[0])(jnp.float32(np.log(p)))
  np.testing.assert_allclose(g, 0, atol=1e-6)


def test_hinged_pulls_above_its_floor_only():
  hinged = losses.hinged(losses.margin, -5.0)
  z = jnp.array([[0.0, 7.0], [0.0, 4.0]])
  value, vjp = jax.vjp(lambda z: hinged(z, jnp.array([1, 1])), z)
  np.testing.assert_allclose(value, [0, 1])
  np.testing.assert_array_equal(vjp(jnp.ones(2))[0], [[0, 0], [1, -1]])


@pytest.mark.parametrize(
  'loss', [losses.log_odds, losses.targeted_xent, losses.margin, losses.smoothed_xent()]
)
def test_losses_are_per_example(loss):
  """Catches a mean or sum over the batch."""
  z = jax.random.normal(jax.random.key(0), (3, 6))
  t = jnp.array([0, 3, 5])
  alone = [loss(z[i : i + 1], t[i : i + 1])[0] for i in range(3)]
  np.testing.assert_allclose(loss(z, t), alone, rtol=1e-6)
  jacobian = jax.jacobian(lambda z: loss(z, t))(z)
  for i in range(3):
    assert not np.delete(np.asarray(jacobian[i]), i, axis=0).any()
    assert np.asarray(jacobian[i, i]).any()


def test_map_distances():
  a, b = (np.random.RandomState(i).rand(3, 4, 5).astype(np.float32) for i in range(2))
  square = np.square(a.astype(np.float64) - b)
  np.testing.assert_allclose(losses.map_mse(a, b), square.mean((1, 2)), rtol=1e-6)
  np.testing.assert_allclose(losses.map_sse(a, b), square.sum((1, 2)), rtol=1e-6)
  np.testing.assert_allclose(losses.map_rms(a, b), np.sqrt(square.mean((1, 2))), rtol=1e-5)


def test_map_rms_has_a_gradient_at_the_solution():
  """The square root's would be NaN there."""
  m = jnp.ones((1, 2, 2))
  g = jax.grad(lambda a: losses.map_rms(a, m)[0])(m)
  assert np.isfinite(g).all()


def test_untargeted_losses_are_between_the_class_and_the_one_that_leads_the_others():
  """Their log-odds are below 0 exactly where the class is not predicted."""
  z, y = np.random.RandomState(0).randn(12, 5) * 4, np.arange(12) % 5
  rows = np.arange(12)
  second = np.array(
    [max(set(range(5)) - {k}, key=lambda j: v[j]) for v, k in zip(z, y, strict=True)]
  )
  np.testing.assert_array_equal(losses.runner_up(jnp.float32(z), y), second)
  apart = z[rows, y] - z[rows, second]
  odds = losses.untargeted(losses.log_odds)(jnp.float32(z), y)
  np.testing.assert_allclose(odds, apart, rtol=1e-5)
  np.testing.assert_array_equal(odds < 0, z.argmax(-1) != y)
  xent = losses.untargeted(losses.targeted_xent)(jnp.float32(z), y)
  np.testing.assert_allclose(xent, np.logaddexp(0, apart), rtol=1e-5)


def test_the_loss_of_the_top_cells():
  """By hand: of ten cells the two strongest count, the first in case of ties."""
  benign = np.float32([[[0, 0.9, 0.3, 0.5, 0.1], [0.9, 0.9, 0.2, 0, 0]]])
  m = np.arange(10, dtype=np.float32).reshape(1, 2, 5)
  np.testing.assert_allclose(losses.top_mass(m, benign), [(1 + 5) / 45], rtol=1e-6)
  np.testing.assert_allclose(losses.top_mass(m, benign, k=0.3), [(1 + 5 + 6) / 45], rtol=1e-6)
  assert losses.top_mass(np.zeros_like(m), benign) == 0


def test_the_centre_of_mass():
  """By hand: three quarters of the mass at one corner, a quarter at the middle of the far side."""
  m = np.zeros((2, 4, 8), np.float32)
  m[0, 0, 0], m[0, 3, 4] = 0.6, 0.2
  centre = np.float64([[0.75 / 8 + 0.25 * 7 / 8, 0.75 / 16 + 0.25 * 9 / 16], [0, 0]])
  np.testing.assert_allclose(losses.centre_of_mass(m), centre, rtol=1e-6)
  benign = np.ones((2, 4, 8), np.float32)  # its centre is 0.5, 0.5
  apart = np.linalg.norm(centre - 0.501, axis=1)
  np.testing.assert_allclose(losses.centre_kept(m, benign), 1 - apart / 2**0.5, rtol=1e-5)


@pytest.mark.parametrize('loss', [losses.top_mass, losses.centre_kept])
def test_gradients_of_the_losses_that_lead_away(loss):
  """Finite differences; where an attack starts there is one too, and it lowers the loss."""
  rng = np.random.RandomState(1)
  benign, m = np.float32(rng.rand(2, 1, 5, 4))
  slope = jax.jit(jax.grad(lambda m: loss(m, benign)[0]))
  direction = np.float32(rng.randn(1, 5, 4))
  h = 1e-2
  difference = (loss(m + h * direction, benign) - loss(m - h * direction, benign)) / (2 * h)
  np.testing.assert_allclose((slope(m) * direction).sum(), difference[0], rtol=0.02)
  start = slope(benign)
  assert np.isfinite(start).all()
  assert loss(benign - 0.02 * np.sign(start), benign) < loss(benign, benign) - 1e-3
