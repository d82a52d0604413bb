"""The L∞ ball: what leaves the set, what the 8-bit grid does, and where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adv2_jax.attacks.perturbations import linf_ball

ULP = 1.2e-7  # float32 at 1
unit = st.floats(0, 1, width=32)
images = hnp.arrays(np.float32, (2, 3, 3, 3), elements=unit)
deltas = hnp.arrays(np.float32, (2, 3, 3, 3), elements=st.floats(-2, 2, width=32))
radii = st.sampled_from([1e-4, 0.031, 8 / 255, 0.5, 1.0])


@given(x0=images, delta=deltas, epsilon=radii)
@settings(max_examples=60, deadline=None)
def test_projection(x0, delta, epsilon):
  ball = linf_ball(epsilon)
  projected = ball.project(x0, delta)
  x = ball.apply(x0, projected)
  assert float(jnp.min(x)) >= 0
  assert float(jnp.max(x)) <= 1
  assert np.abs(np.float64(x) - x0).max() <= epsilon + ULP
  np.testing.assert_allclose(ball.project(x0, projected), projected, atol=ULP)
  # The nearest point: coordinate by coordinate the middle one of delta and the interval's ends.
  low, high = np.maximum(-epsilon, -x0), np.minimum(epsilon, 1 - x0)
  np.testing.assert_allclose(projected, np.clip(delta, low, high), atol=ULP)


@given(x0=images, delta=deltas, epsilon=radii)
@settings(max_examples=40, deadline=None)
def test_the_grid_is_met_and_gradients_pass_straight_through(x0, delta, epsilon):
  ball = linf_ball(epsilon, levels=255)
  delta = ball.project(x0, delta)
  x, vjp = jax.vjp(lambda d: ball.apply(x0, d), delta)
  np.testing.assert_allclose(x * 255, np.round(x * 255), atol=1e-4)
  assert np.abs(np.float64(x) - x0).max() <= epsilon + 0.5 / 255 + ULP
  # One where the image moves with delta: nowhere is the rounding's zero derivative seen.
  inside = (x0 + delta > 1e-6) & (x0 + delta < 1 - 1e-6)
  np.testing.assert_array_equal(np.asarray(vjp(jnp.ones_like(x))[0])[inside], 1)


def test_without_levels_nothing_is_rounded():
  x0 = jnp.full((1, 1, 1, 3), 0.123456)
  np.testing.assert_array_equal(linf_ball(0.1).apply(x0, jnp.zeros_like(x0)), x0)


@pytest.mark.parametrize('epsilon', [0.031, 0.2])
def test_random_start_fills_the_set(epsilon):
  x0 = tiny.images(3)
  keys = jax.vmap(jax.random.key)(jnp.arange(3))
  ball = linf_ball(epsilon, random_start=True)
  delta = ball.init(x0, keys)
  assert np.abs(ball.project(x0, delta) - delta).max() <= ULP
  free = (x0 > epsilon) & (x0 < 1 - epsilon)
  assert np.abs(np.asarray(delta)[free].mean()) < 0.1 * epsilon  # uniform over ±ε, ~ 1000 samples
  assert 0.5 < np.asarray(delta)[free].std() / epsilon < 0.65  # 1/√3
  np.testing.assert_array_equal(ball.init(x0[1:], keys[1:]), delta[1:])  # its key alone
  assert not linf_ball(epsilon).init(x0, keys).any()


def test_penalty_is_none():
  np.testing.assert_array_equal(linf_ball(0.1).penalty(jnp.ones((4, 2, 2, 3))), np.zeros(4))


def test_epsilon_may_be_traced():
  x0 = tiny.images(2)
  project = jax.jit(lambda e, d: linf_ball(e, random_start=True).project(x0, d))
  assert float(jnp.abs(project(0.031, jnp.ones_like(x0))).max()) <= 0.031 + ULP
