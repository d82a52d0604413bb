"""Each set: what leaves it, what the 8-bit grid does, and where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adv2_jax.attacks.perturbations import flow_field, in_radii, l2_ball, l2_tanh, linf_ball
from adv2_jax.images import flow_smoothness, warp
from adv2_jax.types import InputError

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


@pytest.mark.parametrize('made', [linf_ball(0.1), l2_ball(0.1), l2_tanh()], ids=['linf', 'l2', 'w'])
def test_penalty_is_none(made):
  np.testing.assert_array_equal(made.penalty(jnp.ones((4, 2, 2, 3))), np.zeros(4))


def test_epsilon_may_be_traced():
  x0 = tiny.images(2)
  project = jax.jit(lambda e, d: linf_ball(e, random_start=True).project(x0, d))
  assert float(jnp.abs(project(0.031, jnp.ones_like(x0))).max()) <= 0.031 + ULP


# --- L2 -------------------------------------------------------------------------------------------


def norms(v):
  return np.sqrt(np.square(np.float64(v)).sum((1, 2, 3)))


@given(x0=images, delta=deltas, epsilon=st.sampled_from([1e-3, 0.3, 2.0, 40.0]))
@settings(max_examples=60, deadline=None)
def test_l2_projection(x0, delta, epsilon):
  ball = l2_ball(epsilon)
  projected = ball.project(x0, delta)
  x = np.asarray(ball.apply(x0, projected))
  assert x.min() >= 0
  assert x.max() <= 1
  assert (norms(x - x0) <= epsilon * (1 + 1e-5) + 6 * ULP).all()  # of 27 sums
  np.testing.assert_allclose(ball.project(x0, projected), projected, rtol=1e-3, atol=ULP)
  # The nearest point of the ball, where [0,1] does not cut into it.
  scale = np.minimum(1, epsilon / np.maximum(norms(delta), 1e-12)).reshape(-1, 1, 1, 1)
  free = ((x0 + scale * delta >= 0) & (x0 + scale * delta <= 1)).all((1, 2, 3))
  np.testing.assert_allclose(projected[free], (scale * delta)[free], rtol=1e-4, atol=2 * ULP)


def test_each_example_may_have_its_own_l2_radius_and_steps_in_units_of_it():
  x0, radius = jnp.full((3, 4, 4, 3), 0.5), jnp.array([0.1, 0.4, 1.0])
  far = jnp.ones_like(x0)
  np.testing.assert_allclose(norms(l2_ball(radius).project(x0, far)), radius, rtol=1e-5)
  unit = in_radii(l2_ball(radius), radius)
  delta = unit.project(x0, far)
  np.testing.assert_allclose(norms(delta), 1, rtol=1e-5)
  np.testing.assert_allclose(norms(unit.apply(x0, delta) - x0), radius, rtol=1e-4)
  np.testing.assert_array_equal(unit.init(x0, None), jnp.zeros_like(x0))


def test_rounding_leads_out_of_the_l2_ball_by_half_a_level_at_most():
  x0 = tiny.images(2)
  ball = l2_ball(0.7, levels=255)
  delta = ball.project(x0, jax.random.normal(jax.random.key(0), x0.shape))
  x = ball.apply(x0, delta)
  np.testing.assert_allclose(x * 255, np.round(x * 255), atol=1e-4)
  assert (norms(x - x0) <= 0.7 + 0.5 / 255 * x0[0].size ** 0.5).all()
  assert (norms(x - x0) > 0.5).all()


# --- C&W ------------------------------------------------------------------------------------------


def test_tanh_space_starts_at_the_image_and_never_leaves_the_range():
  x0 = tiny.images(2)  # some pixels at 0 and at 1
  for levels, far in ((None, 1e-6), (255, ULP)):
    made = l2_tanh(levels=levels)
    start = made.init(x0, None)
    assert np.isfinite(start).all()
    np.testing.assert_allclose(made.apply(x0, start), x0, atol=far)
    moved = made.apply(x0, start + 50 * jax.random.normal(jax.random.key(0), x0.shape))
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    np.testing.assert_array_equal(made.project(x0, start), start)


def test_tanh_space_has_a_derivative_and_a_price():
  x0, made = tiny.images(2), l2_tanh()
  w = made.init(x0, None)
  # dx/dw = (1 − tanh²)/2 = 2 x (1 − x).
  inner = jnp.clip(x0, 1e-3, 1 - 1e-3)
  got = jax.grad(lambda w: made.apply(x0, w).sum())(made.init(inner, None))
  np.testing.assert_allclose(got, 2 * inner * (1 - inner), rtol=2e-2, atol=1e-5)
  assert jnp.all(jax.grad(lambda w: made.apply(x0, w).sum())(w) > 0)
  x = jnp.clip(x0 + 0.1, 0, 1)
  np.testing.assert_allclose(made.price(x0, x), norms(x - x0) ** 2, rtol=1e-5)
  assert not linf_ball(0.1).price(x0, x).any()


# --- StAdv ----------------------------------------------------------------------------------------


def test_the_flow_starts_within_a_tenth_of_a_pixel_and_depends_on_its_key_alone():
  x0 = tiny.images(3)
  keys = jax.vmap(jax.random.key)(jnp.arange(3))
  flow = flow_field().init(x0, keys)
  assert flow.shape == (3, 16, 16, 2)
  assert 0.09 < float(jnp.abs(flow).max()) <= 0.1
  assert abs(float(flow.mean())) < 0.01
  np.testing.assert_array_equal(flow_field().init(x0[1:], keys[1:]), flow[1:])


def test_the_flow_warps_and_its_penalty_includes_tau():
  x0, made = tiny.images(2), flow_field(0.25, levels=255)
  flow = jax.random.uniform(jax.random.key(1), (2, 16, 16, 2), jnp.float32, -2, 2)
  x, pull = jax.vjp(lambda flow: made.apply(x0, flow), flow)
  assert np.abs(x - warp(x0, flow)).max() <= 0.5 / 255 + ULP
  np.testing.assert_allclose(x * 255, np.round(x * 255), atol=1e-4)
  plain = jax.grad(lambda flow: warp(x0, flow).sum())(flow)
  np.testing.assert_allclose(pull(jnp.ones_like(x))[0], plain, atol=1e-5)
  np.testing.assert_allclose(made.penalty(flow), 0.25 * flow_smoothness(flow), rtol=1e-6)
  np.testing.assert_array_equal(made.project(x0, flow), flow)


@pytest.mark.parametrize('tau', [0, -1e-3, float('nan'), float('inf')])
def test_a_tau_that_is_not_positive_is_refused(tau):
  with pytest.raises(InputError, match=f'flow_field tau is {tau}; expected a positive weight'):
    flow_field(tau)
