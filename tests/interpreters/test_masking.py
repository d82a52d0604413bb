"""MASK: its linear parts in closed form, objective and gradients as torch's, its solver."""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import PARITY
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.weights import numpy_weights

from adv2_jax import api, interpreters, nets
from adv2_jax.attacks import presets
from adv2_jax.classifier import from_linen
from adv2_jax.interpreters import masking as M
from adv2_jax.types import InputError
from adv2_jax.weights import zoo

SMALL = M.MaskConfig(size=4, jitter=0, area=1e-2, smoothness=1e-1, blur=5, mask_blur=3, steps=40)
CLF = tiny.classifier()
X = tiny.images(3)
Y = jnp.array([0, 3, 4])
KEYS = jax.vmap(jax.random.key)(jnp.arange(3))

solve = jax.jit(M.solve, static_argnames=('config', 'steps'))
objective = jax.jit(M.mask_objective, static_argnames='config')


# --- the linear parts -----------------------------------------------------------------------------


@given(st.integers(3, 30), st.sampled_from([1, 3, 5]))
@settings(max_examples=20, deadline=None)
def test_the_blur_keeps_constants_and_reflects(size, width):
  g = M.gaussian_matrix(size, width)
  np.testing.assert_allclose(g.sum(1), 1, atol=1e-6)
  v = np.random.RandomState(size).rand(size)
  padded = np.pad(v, width // 2, mode='reflect')
  sigma = 0.3 * ((width - 1) / 2 - 1) + 0.8
  kernel = np.exp(-((np.arange(width) - width // 2) ** 2) / (2 * sigma**2))
  by_hand = np.convolve(padded, kernel / kernel.sum(), 'valid')
  np.testing.assert_allclose(g @ v, by_hand, atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_resampling_is_bilinear_with_half_pixel_centres(size, new_size):
  place = (np.arange(new_size) + 0.5) * size / new_size - 0.5
  v = np.random.RandomState(size).rand(size)
  expected = np.interp(place, np.arange(size), v)  # np.interp clamps at the ends, too
  np.testing.assert_allclose(M.bilinear_matrix(size, new_size) @ v, expected, atol=1e-6)


def test_a_full_mask_keeps_the_image_and_an_empty_one_blurs_it():
  kept = M.perturbed(X, jnp.ones((3, 4, 4)), SMALL)
  np.testing.assert_allclose(kept, X, atol=1e-6)
  blurred = M.perturbed(X, jnp.zeros((3, 4, 4)), SMALL)
  g = M.gaussian_matrix(tiny.SIZE, 5)
  np.testing.assert_allclose(blurred, np.einsum('ih,bhwc,jw->bijc', g, X, g), atol=1e-6)


def test_jitter_is_a_crop_of_the_resized_image_at_an_offset_of_each_example():
  jitter = 3
  r = M.bilinear_matrix(tiny.SIZE, tiny.SIZE + jitter)
  larger = np.einsum('ih,bhwc,jw->bijc', r, X, r)
  met = set()
  for seed in range(12):
    keys = jax.vmap(jax.random.key)(jnp.arange(3) + 100 * seed)
    cropped = np.asarray(M.jittered(X, keys, jitter))
    for image, whole in zip(cropped, larger, strict=True):
      fits = [
        (i, j)
        for i in range(jitter)
        for j in range(jitter)
        if np.allclose(whole[i : i + tiny.SIZE, j : j + tiny.SIZE], image, atol=1e-6)
      ]
      assert len(fits) == 1
      met.update(fits)
  assert len(met) > 5  # of 9
  assert M.jittered(X, KEYS, 0) is X


def test_the_regulariser_in_closed_form():
  """A step of height a between two columns: area, and one |a|^β per row but the last."""
  m = jnp.concatenate([jnp.ones((1, 4, 2)), jnp.full((1, 4, 2), 0.4)], axis=2)
  expected = SMALL.area * 8 * 0.6 + SMALL.smoothness * 3 * 0.6**SMALL.beta
  np.testing.assert_allclose(M.regulariser(m, SMALL), [expected], rtol=1e-4)


# --- the objective --------------------------------------------------------------------------------


def test_objective_and_gradients_agree_with_torch():
  golden = np.load(PARITY / 'mask_objective_resnet50.npz')
  shapes = json.loads(str(np.load(PARITY / 'resnet50.npz')['shapes']))
  module = nets.build('resnet50')
  clf = from_linen(module, zoo.load_variables(module, numpy_weights(shapes, 2)))
  x = jnp.asarray(np.random.RandomState(1).rand(2, 224, 224, 3), jnp.float32)
  y = jnp.array([3, 7])

  @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 1})
  def value_and_gradients(clf, m, x):
    def total(m, x):
      value = M.mask_objective(clf, m, x, y, M.MaskConfig(jitter=0))
      return value.sum(), value

    (_, value), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(m, x)
    return value, *gradients

  value, by_m, by_x = value_and_gradients(clf, jnp.asarray(golden['m']), x)
  np.testing.assert_allclose(value, golden['loss'], rtol=1e-5)
  apart = lambda mine, theirs: np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)  # noqa: E731
  assert apart(by_m, golden['grad_m']) < 1e-4
  # Rounded otherwise, as on another processor, units near their kink are on the other side: 3e-3.
  assert apart(by_x[:, ::4, ::4], golden['grad_x']) < 5e-3


# --- the solver and the attack's look ahead -------------------------------------------------------


def test_the_solution_is_no_worse_than_start_neighbours_and_extremes():
  m = solve(CLF, X, Y, KEYS, SMALL).mask
  assert m.shape == (3, 4, 4)
  assert float(m.min()) >= 0
  assert float(m.max()) <= 1
  best = objective(CLF, m, X, Y, SMALL)
  for other in (jnp.full_like(m, 0.5), jnp.ones_like(m), jnp.zeros_like(m)):
    assert (best <= objective(CLF, other, X, Y, SMALL) + 1e-4).all()


def test_the_fast_solver_gets_as_low_with_a_third_of_the_iterations():
  config = SMALL._replace(steps=300, jitter=2)
  found = {}
  for c in (config, M.fast(config)):
    m = solve(CLF, X, Y, KEYS, c).mask
    found[c.steps] = float(objective(CLF, m, X, Y, config).mean())
  assert list(found) == [300, 100]
  assert found[100] <= found[300], found


def test_a_falling_rate_ends_at_zero():
  config = SMALL._replace(steps=9, decay=True)
  at_the_end, after = (solve(CLF, X, Y, KEYS, config, steps=n) for n in (9, 15))
  np.testing.assert_array_equal(after.mask, at_the_end.mask)
  assert np.abs(at_the_end.mask - solve(CLF, X, Y, KEYS, config, steps=5).mask).max() > 1e-3


def test_solving_in_two_parts_is_solving_at_once():
  whole = solve(CLF, X, Y, KEYS, SMALL, steps=12)
  half = solve(CLF, X, Y, KEYS, SMALL, steps=5)
  np.testing.assert_array_equal(solve(CLF, X, Y, KEYS, SMALL, half, steps=7).mask, whole.mask)


def test_the_solver_s_derivative_against_finite_differences():
  """∂/∂x of an iteration's mask, in double precision: a ReLU net's kinks forbid long steps."""
  with jax.enable_x64(True):
    double = lambda v: v.astype(jnp.float64) if v.dtype == jnp.float32 else v  # noqa: E731
    clf, x, state = jax.tree.map(double, (CLF, X, solve(CLF, X, Y, KEYS, SMALL, steps=20)))
    wanted = jnp.asarray(np.random.RandomState(0).rand(3, 4, 4))

    @jax.jit
    def ahead(clf, x):
      return jnp.sum((1 - M.solver_step(clf, state, x, Y, KEYS, SMALL).mask - wanted) ** 2)

    g = jax.jit(jax.grad(ahead, argnums=1))(clf, x)
    assert g.dtype == jnp.float64
    rng, step = np.random.RandomState(1), 1e-6
    directions = [jnp.asarray(np.sign(g) + rng.randn(*g.shape)) for _ in range(4)]
    measured = [
      float(ahead(clf, x + step * d) - ahead(clf, x - step * d)) / (2 * step) for d in directions
    ]
    predicted = [float(jnp.vdot(g, d)) for d in directions]
  assert np.linalg.norm(predicted) > 0
  np.testing.assert_allclose(predicted, measured, rtol=1e-3)


def test_the_hyper_gradient_of_the_solution_against_finite_differences():
  """∂/∂x of the distance of the solved map, through all of the solver's iterations.

  On a smooth net: kinks would forbid steps long enough to rise above what 40 iterations make of
  the rounding.
  """
  config, step = SMALL._replace(area=3e-3), 1e-5
  with jax.enable_x64(True):
    smooth = tiny.classifier(act=nn.softplus)
    clf, x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (smooth, X))
    wanted = jnp.asarray(np.random.RandomState(0).rand(3, 4, 4))

    @jax.jit
    def solved(clf, x):
      return jnp.sum((1 - M.solve(clf, x, Y, KEYS, config).mask - wanted) ** 2)

    g = jax.jit(jax.grad(solved, argnums=1))(clf, x)
    rng = np.random.RandomState(1)
    directions = [jnp.asarray(rng.randn(*g.shape)) for _ in range(12)]
    measured = np.array(
      [float(solved(clf, x + step * d) - solved(clf, x - step * d)) / 2 / step for d in directions]
    )
    predicted = np.array([float(jnp.vdot(g, d)) for d in directions])
  norms = np.linalg.norm(predicted), np.linalg.norm(measured)
  assert min(norms) > 0.1
  assert predicted @ measured / np.prod(norms) > 0.99
  assert norms[0] / norms[1] == pytest.approx(1, abs=0.02)


# --- what the attack imitates ---------------------------------------------------------------------


def test_the_path_is_the_solver_s():
  path, end = jax.jit(M.solver_path, static_argnums=4)(CLF, X, Y, KEYS, SMALL)
  assert path.shape == (3, SMALL.steps, 4, 4)
  for i in (0, 1, 7):
    there = solve(CLF, X, Y, KEYS, SMALL, steps=i).mask
    np.testing.assert_allclose(path[:, i], there, atol=1e-5)
  np.testing.assert_allclose(end, solve(CLF, X, Y, KEYS, SMALL).mask, atol=1e-4)


def patches(size):
  """Three maps [3,size,size]: a box, noisy as random patches are; a faint one; an empty one."""
  rng, box = np.random.RandomState(0), np.zeros((size, size), bool)
  box[1 : size // 2, size // 4 : -size // 4] = True
  noisy = np.where(box, rng.uniform(0.9, 1, box.shape), rng.uniform(0, 0.1, box.shape))
  return box, jnp.asarray([noisy, 0.3 * noisy, 0 * noisy], jnp.float32)


@pytest.mark.parametrize('config', [M.SCENES, M.MaskConfig(jitter=0)])
def test_over_the_linear_view_the_solver_ends_near_the_map(config):
  """That no class is at stake with an empty map is what keeps the mask whole."""
  box, maps = patches(config.size)
  _, end = jax.jit(M.linear_path, static_argnums=1)(M.evidence_of(maps), config)
  found = np.asarray(1 - end)
  for one in found[:2]:  # the strength of a map is not what counts
    top = np.zeros_like(box)
    top.flat[np.argsort(-one, axis=None)[: box.sum()]] = True
    assert (top & box).sum() / (top | box).sum() > 0.8
    assert one[box].mean() > 3 * one[~box].mean()
  np.testing.assert_allclose(found[2], 0, atol=1e-3)


def test_the_linear_view_s_slope_is_its_derivative():
  _, maps = patches(4)
  m = jnp.asarray(np.random.RandomState(0).uniform(0, 1, (3, 4, 4)), jnp.float32)
  e = M.evidence_of(maps)
  slope = jax.grad(lambda m: M.linear_view(m, e).u.sum())(m)
  np.testing.assert_allclose(M.linear_view(m, e).slope, slope, atol=1e-5)
  kept, gone = M.linear_view(jnp.ones_like(m), e).u, M.linear_view(jnp.zeros_like(m), e).u
  np.testing.assert_allclose(kept, [M.SURE, M.SURE, -M.GONE], rtol=1e-5)
  np.testing.assert_allclose(gone, [M.GONE, M.GONE, -M.GONE], rtol=1e-5)


@pytest.mark.parametrize('jitter', [0, 3])
def test_the_way_is_the_one_that_ends_closer_to_the_map(jitter):
  """The clean image's for its own map; else the linear one, where what is seen is known."""
  c = SMALL._replace(jitter=jitter, area=0.1)
  interpreter = interpreters.mask(c)
  label = tiny.outputs(CLF, X).logits.argmax(-1)
  maps = 1 - solve(CLF, X, label, KEYS, c).mask
  maps = maps.at[1].set(1 - maps[1]).at[2].set(jnp.eye(4))

  @jax.jit
  def look(clf):
    landscape = interpreter.begin(clf, X, Y, maps, KEYS)
    return landscape, interpreter.unroll(clf, X, label, landscape, KEYS).distance

  landscape, distance = look(CLF)
  np.testing.assert_array_equal(landscape.own, [True, False, False])
  e = M.evidence_of(maps)
  linear = M.linear_path(e, c)[0]
  np.testing.assert_allclose(landscape.path[1:], linear[1:], atol=1e-5)
  assert distance[0] < 1e-3 < 0.1 < distance[1:].min()
  if not jitter:
    seen = M.linear_view(linear[:, 5], e)
    np.testing.assert_allclose(landscape.views.u[1:, 5], seen.u[1:], rtol=1e-4)
    np.testing.assert_allclose(landscape.views.slope[1:, 5], seen.slope[1:], rtol=1e-4)


def test_the_masks_looked_at_are_about_the_path_and_denser_where_it_begins():
  path = jnp.linspace(0.2, 0.8, 50).reshape(-1, 1, 1) * jnp.ones((50, 4, 4))

  @functools.partial(jax.jit, static_argnums=1)
  def draw(key, noise):
    return M._draw(key, path, last=50.0, looks=4, noise=noise)

  masks, place, _ = draw(jax.random.key(0), 0.0)
  np.testing.assert_array_equal(masks, path[place])
  for i, low, high in zip(place, (0, 3, 12, 28), (3, 12, 28, 49), strict=True):
    assert low <= i <= high
  noisy, place, _ = draw(jax.random.key(1), 0.1)
  apart = np.asarray(noisy - path[place])
  assert 0.05 < apart.std() < 0.15
  np.testing.assert_array_equal(noisy, draw(jax.random.key(1), 0.1)[0])


def test_a_view_is_the_log_odds_and_their_derivative():
  m = jnp.asarray(np.random.RandomState(0).uniform(0.2, 0.8, (3, 4, 4)), jnp.float32)
  seen = jax.jit(M.view, static_argnums=(4, 5))(CLF, m, X, Y, SMALL, True)
  p = jax.nn.softmax(tiny.outputs(CLF, M.perturbed(X, m, SMALL)).logits)[jnp.arange(3), Y]
  np.testing.assert_allclose(seen.u, jnp.log((1 - p) / p), rtol=1e-4, atol=1e-5)
  step = 1e-3 * jnp.ones_like(m).at[:, 2:].set(-1)
  u = lambda m: M.view(CLF, m, X, Y, SMALL, False).u  # noqa: E731
  measured, predicted = u(m + step) - u(m - step), 2 * jnp.sum(seen.slope * step, axis=(1, 2))
  np.testing.assert_allclose(measured, predicted, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize('options', [{'slope': 0.0}, {'looks': 3}, {'noise': 0.1}])
@pytest.mark.parametrize('jitter', [0, 1, 3])
def test_nothing_is_amiss_on_the_clean_image_and_its_own_class(jitter, options):
  """Whether the clean image was looked at before the first step or is looked at in each."""
  interpreter = interpreters.mask(SMALL._replace(jitter=jitter), **options)
  own = tiny.outputs(CLF, X).logits.argmax(-1)

  @jax.jit
  def distance(clf, x, y):
    landscape = interpreter.begin(clf, X, y, interpreter.explain(clf, X, own, KEYS), KEYS)
    assert (landscape.views is None) == (jitter > 1 or 'noise' in options)
    return interpreter.unroll(clf, x, y, landscape, KEYS).distance

  np.testing.assert_allclose(distance(CLF, X, own), 0, atol=1e-3)
  assert float(distance(CLF, X, (own + 1) % tiny.CLASSES).min()) > 0.1
  assert float(distance(CLF, 1 - X, own).min()) > 2e-3


def test_misfit_by_hand():
  u = jnp.array([1.0, -9.0, -5.0, 9.0, 5.0, -9.0])
  wanted = jnp.array([3.0, -7.0, -7.0, 7.0, 7.0, 7.0])
  np.testing.assert_allclose(M.misfit(u, wanted, 6.0), [2, 0, 1, 0, 1, 15])


def test_pull_tells_which_way_the_solver_moves():
  """Its sign is that of the objective's derivative, without the smoothness; and by hand."""
  config = SMALL._replace(smoothness=0.0, area=3e-3)
  m = jax.random.uniform(jax.random.key(5), (len(X), 4, 4), jnp.float32)
  y = jnp.argsort(tiny.outputs(CLF, X).logits)[:, -1]
  gradient = jax.grad(lambda m: M.mask_objective(CLF, m, X, y, config).sum())(m)
  pulls = M.pull(M.view(CLF, m, X, y, config, slope=True), config)
  assert 0.1 < float((gradient > 0).mean()) < 0.9
  np.testing.assert_array_equal(np.sign(pulls), np.sign(gradient))
  seen = M.View(jnp.zeros(1), jnp.array([[[-0.048, 0.0]]]))  # p(1 − p) = 1/4
  np.testing.assert_allclose(M.pull(seen, config), [[[0.75, -0.5]]], rtol=1e-5)


@pytest.mark.parametrize(('jitter', 'steps'), [(0, 40), (1, 40), (2, 13)])
def test_the_map_is_solved_now_and_then_to_choose_the_iterate(jitter, steps):
  """Only roughly where it depends on random numbers, as it then takes more iterations."""
  interpreter = interpreters.mask(SMALL._replace(jitter=jitter))
  recipe = presets.fast('mask')
  schedule = recipe.schedule(CLF, interpreter, recipe.perturbation(0.1), jax.random.key(0))
  attack, _ = schedule[-1]
  spent = interpreter.begin_passes + 20 * interpreter.passes[1]
  assert attack.passes(20) == spent + 2 * 2 * steps


def test_the_attack_keeps_the_map():
  """On a linear classifier, where all that the solver sees can be imitated; judged by solving."""
  clf = tiny.linear_classifier(size=16)
  clf = clf.replace(params=0.5 * clf.params)
  interpreter = interpreters.mask(SMALL)
  x = tiny.images(8, seed=3)
  y = tiny.outputs(clf, x).logits.argmax(-1)
  target = (y + 1) % tiny.CLASSES
  benign = api.explain(clf, interpreter, x, y, jax.vmap(jax.random.key)(jnp.arange(8)))
  epsilon, key = 0.2, jax.random.key(0)
  found = api.attack(
    clf, interpreter, x, target=target, label=y, target_map=benign, epsilon=epsilon, steps=60
  )
  batch = tiny.batch(x, target, benign)
  plain, _ = api.attack_batch(presets.plain_pgd('fast'), clf, interpreter, batch, epsilon, key)
  hit = np.asarray(found.success & (tiny.outputs(clf, plain).logits.argmax(-1) == target))
  assert hit.sum() >= 5
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(8))
  far, near = (
    np.abs(api.explain(clf, interpreter, v, target, keys) - benign).mean((1, 2))[hit].mean()
    for v in (plain, found.x)
  )
  assert near < 0.65 * far, (near, far)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'size': 0}, 'mask size is 0; expected a whole number, at least 1'),
    ({'size': 4.5}, 'mask size is 4.5; expected a whole number, at least 1'),
    ({'steps': 0}, 'mask steps is 0; expected a whole number, at least 1'),
    ({'jitter': -1}, 'mask jitter is -1; expected a whole number, at least 0'),
    ({'area': math.nan}, 'mask area is nan; expected 0 or more'),
    ({'smoothness': math.inf}, 'mask smoothness is inf; expected 0 or more'),
    ({'beta': -1.0}, 'mask beta is -1.0; expected a positive number'),
    ({'learning_rate': math.inf}, 'mask learning_rate is inf; expected a positive number'),
    ({'blur': 4}, 'mask blur is 4; expected an odd number of pixels'),
    ({'mask_blur': -3}, 'mask mask_blur is -3; expected an odd number of pixels'),
    ({'size': 6.0}, 'mask size is 6.0; expected a whole number'),
    ({'steps': 'ten'}, "mask steps is 'ten'; expected a whole number"),
    ({'b2': 1.0}, 'mask b2 is 1.0; expected 0 to less than 1'),
    ({'start': 1.5}, 'mask start is 1.5; expected 0 to 1'),
    ({'learning_rate': 0.0}, 'mask learning_rate is 0.0; expected a positive number'),
  ],
)
def test_settings_that_make_no_sense(change, message):
  with pytest.raises(InputError, match=message):
    interpreters.mask(SMALL._replace(**change))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'size': 17}, 'mask size is 17 cells; expected at most 16'),
    ({'jitter': 16}, 'mask jitter is 16 px; expected less than 16'),
    ({'blur': 33}, 'a blur is 33 px wide; expected an odd width of 1 to 31'),
  ],
)
def test_settings_that_do_not_fit_the_images(change, message):
  with pytest.raises(InputError, match=message):
    interpreters.mask(SMALL._replace(**change)).explain(CLF, X, Y, KEYS)


def test_what_are_no_settings_or_no_decoder():
  with pytest.raises(InputError, match=r"the settings of mask are 'fast'; expected a MaskConfig\("):
    interpreters.mask('fast')
  with pytest.raises(InputError, match=r'decoder is None; expected one from load_decoder\('):
    interpreters.rts(None)


def test_the_solver_itself_refuses_settings_that_make_no_sense():
  with pytest.raises(InputError, match='mask steps is 0; expected a whole number, at least 1'):
    M.solve(CLF, X, Y, KEYS, SMALL._replace(steps=0))


def test_a_warm_start_from_a_solution_moves_anew_and_ends_as_low():
  config = SMALL._replace(decay=True)
  found = solve(CLF, X, Y, KEYS, config)
  warm = M.start(config, X, found.mask)
  again = solve(CLF, X, Y, KEYS, config, warm)
  assert np.abs(again.mask - found.mask).max() > 1e-3  # it moves: its rate begins anew
  best = objective(CLF, found.mask, X, Y, config)
  assert (objective(CLF, again.mask, X, Y, config) <= best * 1.01 + 1e-4).all()


def test_a_surrogate_of_fixed_activation_is_taken_as_it_is():
  fixed = CLF.replace(surrogate_fn=lambda p, x: CLF.surrogate_fn(p, x))
  interp = interpreters.mask(SMALL)
  carry = interp.begin(fixed, X, Y, jnp.full((3, 4, 4), 0.5), KEYS)
  seen = interp.unroll(fixed, X, (Y + 1) % 5, carry, KEYS)
  assert (seen.distance > 0).all()
