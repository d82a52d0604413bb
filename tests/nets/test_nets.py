"""The zoo against torch's recorded numbers, and soft_relu against its closed form."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PARITY
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.weights import numpy_weights

from adv2_jax import nets
from adv2_jax.classifier import from_linen
from adv2_jax.nets import soft_relu
from adv2_jax.types import InputError
from adv2_jax.weights import zoo

# Strides and channels of the taps, from the architectures' papers.
TAPS = {
  'resnet18': [(2, 64), (4, 64), (8, 128), (16, 256), (32, 512)],
  'resnet34': [(2, 64), (4, 64), (8, 128), (16, 256), (32, 512)],
  'resnet50': [(2, 64), (4, 256), (8, 512), (16, 1024), (32, 2048)],
  'resnet101': [(2, 64), (4, 256), (8, 512), (16, 1024), (32, 2048)],
  'densenet121': [(2, 64), (4, 256), (8, 512), (16, 1024), (32, 1024)],
  'densenet169': [(2, 64), (4, 256), (8, 512), (16, 1280), (32, 1664)],
  'cifar_resnet20': [(1, 16), (1, 16), (2, 32), (4, 64)],
  'cifar_resnet56': [(1, 16), (1, 16), (2, 32), (4, 64)],
  'scene_resnet': [(2, 16), (2, 16), (4, 32), (8, 96)],
}
floats = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)  # XLA flushes those to 0
taus = st.sampled_from([1e-2, 1e-4, 1e-6])


def slope(z, tau, form):
  """h(z), in float64."""
  z = np.asarray(z, np.float64)
  r = z / np.sqrt(z**2 + tau)
  return (1 + r) / 2 if form == 'smooth' else np.where(z < 0, 1 + r, r)


def curvature(z, tau, form):
  """h'(z), in float64."""
  z = np.asarray(z, np.float64)
  return tau / (z**2 + tau) ** 1.5 / (2 if form == 'smooth' else 1)


def random_variables(module):
  """Random weights and running statistics; quicker than running the net's own initialisation."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return zoo.load_variables(module, numpy_weights(zoo.tensor_shapes(shapes), seed=3))


# One net of each family, cut down to what compiles quickly.
SMALL = [
  nets.SceneResNet(),
  nets.CifarResNet(1),
  nets.ResNet((1, 1), nets.Bottleneck, num_classes=10),
  nets.DenseNet((1, 1), num_classes=10),
]
each_family = pytest.mark.parametrize('module', SMALL, ids=lambda module: type(module).__name__)


# --- soft_relu ------------------------------------------------------------------------------------


def test_soft_relu_agrees_with_the_authors_function():
  golden = np.load(PARITY / 'soft_relu.npz')
  z = jnp.asarray(golden['z'])
  np.testing.assert_array_equal(soft_relu(z), golden['value'])
  np.testing.assert_allclose(jax.vmap(jax.grad(soft_relu))(z), golden['d1'], rtol=1e-5, atol=1e-6)
  second = jax.vmap(jax.grad(jax.grad(soft_relu)))(z)
  # atol: theirs subtracts two nearly equal float32 numbers.
  np.testing.assert_allclose(second, golden['d2'], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('form', nets.activations.FORMS)
@given(z=st.lists(floats, min_size=5, max_size=5), tau=taus)
@settings(max_examples=30, deadline=None)
def test_soft_relu_derivatives_are_the_closed_forms(form, z, tau):
  """Relative accuracy holds for the curvature even at |z| = 1000, where h itself has saturated."""
  z = jnp.asarray(z, jnp.float32)
  np.testing.assert_array_equal(soft_relu(z, tau, form), jax.nn.relu(z))
  first = jax.jvp(lambda z: soft_relu(z, tau, form), (z,), (jnp.ones_like(z),))[1]
  np.testing.assert_allclose(first, slope(z, tau, form), atol=2e-6)
  gradient = jax.grad(lambda z: soft_relu(z, tau, form).sum())
  np.testing.assert_allclose(
    jax.jvp(gradient, (z,), (jnp.ones_like(z),))[1], curvature(z, tau, form), rtol=1e-4
  )


@pytest.mark.parametrize('form', nets.activations.FORMS)
def test_soft_relu_keeps_its_slope_under_an_outer_derivative(form):
  """For f(f(z)): (f∘f)' = h(f)·h and (f∘f)'' = h'(f)·h² + h(f)·h', with f the exact ReLU."""
  z, tau = np.linspace(-0.05, 0.05, 11, dtype=np.float32), 1e-4
  f = np.maximum(z, 0)
  h, dh = slope(z, tau, form), curvature(z, tau, form)
  outer_h, outer_dh = slope(f, tau, form), curvature(f, tau, form)

  def twice(z):
    return soft_relu(soft_relu(z, tau, form), tau, form)

  first = jax.jit(jax.vmap(jax.grad(twice)))(z)
  np.testing.assert_allclose(first, outer_h * h, rtol=1e-4, atol=1e-6)
  second = jax.jit(jax.vmap(jax.grad(jax.grad(twice))))(z)
  np.testing.assert_allclose(second, outer_dh * h**2 + outer_h * dh, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [({'tau': 0.0}, 'tau is 0.0'), ({'tau': -1.0}, 'tau is -1.0'), ({'form': 'soft'}, "'printed'")],
)
def test_soft_relu_refuses(fields, words):
  with pytest.raises(InputError, match=words):
    soft_relu(jnp.ones(2), **fields)


# --- other activations ----------------------------------------------------------------------------

KINKED = {
  'relu': (jax.nn.relu, [(0, 1)]),
  'relu6': (jax.nn.relu6, [(0, 1), (6, -1)]),
  'leaky_relu': (functools.partial(jax.nn.leaky_relu, negative_slope=0.2), [(0, 0.8)]),
  'hard_tanh': (jax.nn.hard_tanh, [(-1, 1), (1, -1)]),
  'hard_sigmoid': (jax.nn.hard_sigmoid, [(-3, 1 / 6), (3, -1 / 6)]),
  'hard_swish': (jax.nn.hard_swish, [(-3, -0.5), (3, -0.5)]),  # and curved in between
  'selu': (jax.nn.selu, [(0, 1.0507 * (1 - 1.67326))]),
  'clip': (lambda z: jnp.clip(z, 0, 20), [(0, 1), (20, -1)]),  # a ReLU as far as 20
}
SMOOTH = ['gelu', 'silu', 'tanh', 'softplus', 'sigmoid', 'celu', 'elu', 'mish', 'identity']


@pytest.mark.parametrize('name', KINKED)
def test_kinks_are_found(name):
  act, expected = KINKED[name]
  found = nets.activations.kinks(act)
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('name', SMOOTH)
def test_smooth_activations_have_none_and_stay_as_they_are(name):
  """ELU too: its slope does not jump, only its curvature."""
  act = getattr(jax.nn, name)
  assert nets.activations.kinks(act) == ()
  assert nets.activations.softened(act) is act


@pytest.mark.parametrize(
  'act', [jnp.sign, jnp.round, lambda z: jnp.abs(z - jnp.round(z)), jax.nn.glu, lambda: 0]
)
def test_what_is_no_sum_of_relus_cannot_be_told(act):
  assert nets.activations.kinks(act) is None


@pytest.mark.parametrize('name', KINKED)
@pytest.mark.parametrize('form', nets.activations.FORMS)
def test_softened_activations_keep_their_values_and_lose_their_kinks(name, form):
  """Slope: the own one plus Σ c (h(z − t) − step(z − t)); curvature: the own one plus Σ c h'."""
  act, expected = KINKED[name]
  smooth = nets.activations.softened(act, functools.partial(soft_relu, tau=1e-2, form=form))
  z = np.concatenate([np.linspace(t - 0.33, t + 0.3, 8) for t, _ in expected]).astype(np.float32)
  slope_of = lambda f: lambda z: jax.vjp(f, z)[1](jnp.ones_like(z))[0]  # noqa: E731

  @jax.jit
  def all_of(z):
    fs = (act, smooth)
    return [(f(z), slope_of(f)(z), slope_of(slope_of(f))(z)) for f in fs]

  (value, own, bend), (same, first, second) = all_of(z)
  np.testing.assert_array_equal(same, value)
  more = sum(c * (slope(z - t, 1e-2, form) - (z > t)) for t, c in expected)
  np.testing.assert_allclose(first, own + more, atol=1e-4)
  more = sum(c * curvature(z - t, 1e-2, form) for t, c in expected)
  np.testing.assert_allclose(second, bend + more, rtol=1e-3, atol=1e-3)


# --- the nets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'name',
  [
    'resnet18',
    'resnet50',
    'densenet121',
    'cifar_resnet20',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('resnet34', 'resnet101', 'densenet169', 'cifar_resnet56')
    ),
  ],
)
def test_logits_and_features_agree_with_torch(name):
  golden = np.load(PARITY / f'{name}.npz')
  module = nets.build(name)
  tensors = numpy_weights(json.loads(str(golden['shapes'])), int(golden['seed']))
  classifier = from_linen(module, zoo.load_variables(module, tensors))
  size = nets.DEFAULTS[name].image_size
  x = np.random.RandomState(1).rand(2, size, size, 3).astype(np.float32)
  logits, taps = jax.jit(lambda classifier, x: classifier(x))(classifier, x)
  for actual, expected in [(logits, golden['logits']), (taps['features'], golden['features'])]:
    actual = actual[..., : expected.shape[-1]]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('name', nets.ZOO)
def test_taps_have_the_architecture_s_strides(name):
  size = nets.DEFAULTS[name].image_size
  module = nets.build(name, num_classes=7)
  x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  (logits, taps), _ = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
  assert logits.shape == (2, 7)
  expected = dict(zip(['stem', 'stage1', 'stage2', 'stage3'], TAPS[name][:-1], strict=False))
  expected['features'] = TAPS[name][-1]
  assert {k: (size // t.shape[1], t.shape[-1]) for k, t in taps.items()} == expected


def test_defaults_cover_the_zoo_and_are_the_modules_own():
  assert nets.DEFAULTS.keys() == nets.ZOO.keys()
  for name, defaults in nets.DEFAULTS.items():
    assert nets.build(name).num_classes == defaults.num_classes


def test_scene_resnet_fits_its_budget():
  """0.3 to 0.9 M numbers, so that they take at most 2 MB as float16."""
  shapes = jax.eval_shape(
    nets.build('scene_resnet').init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))
  )
  assert 0.3e6 < sum(x.size for x in jax.tree.leaves(shapes)) < 0.9e6


@each_family
def test_head_of_the_features_gives_the_logits(module):
  x = jax.random.normal(jax.random.key(2), (3, 32, 32, 3))
  variables = random_variables(module)
  logits, taps = jax.jit(module.apply)(variables, x)
  head = module.apply(variables, taps['features'], method='head')
  np.testing.assert_allclose(head, logits, rtol=1e-5, atol=1e-5)
  before_act = [name for name, tap in taps.items() if float(tap.min()) < 0]
  # A dense block's output is the concatenation of sums that no activation has seen.
  assert before_act == (['stage1'] if isinstance(module, nets.DenseNet) else [])


@each_family
def test_training_moves_every_running_statistic(module):
  """One norm that was not told of training would keep its first statistics for good."""
  x = jax.random.normal(jax.random.key(2), (4, 32, 32, 3))
  variables = random_variables(module)
  train = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=['batch_stats'])[1])
  moved = jax.tree.map(
    lambda a, b: bool((a != b).all()), train(variables, x)['batch_stats'], variables['batch_stats']
  )
  assert all(jax.tree.leaves(moved)), moved


def test_the_surrogate_has_the_real_net_s_values_but_another_gradient():
  module = nets.CifarResNet(1)
  classifier = from_linen(module, random_variables(module))
  x = jax.random.uniform(jax.random.key(3), (2, 16, 16, 3))

  def value_and_grad(apply):
    return jax.jit(jax.value_and_grad(lambda x: apply(x).logits[:, 0].sum()))(x)

  (real_logit, real), (soft_logit, soft) = map(
    value_and_grad, (classifier.__call__, classifier.surrogate)
  )
  np.testing.assert_allclose(real_logit, soft_logit, rtol=1e-5)
  assert 1e-3 < float(jnp.abs(real - soft).max() / jnp.abs(real).max()) < 1


def test_bfloat16_is_close_to_float32():
  module = nets.CifarResNet(1)
  variables = random_variables(module)
  x = jax.random.normal(jax.random.key(3), (4, 32, 32, 3))
  full = jax.jit(module.apply)(variables, x)
  half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(variables, x)
  error = jnp.abs(half.logits - full.logits).max() / jnp.abs(full.logits).max()
  assert 0 < float(error) < 0.03


@each_family
def test_bfloat16_taps_and_float32_logits(module):
  x = jnp.zeros((1, 32, 32, 3))
  out, _ = jax.eval_shape(module.clone(dtype=jnp.bfloat16).init_with_output, jax.random.key(0), x)
  assert {tap.dtype for tap in out.taps.values()} == {jnp.dtype(jnp.bfloat16)}
  assert out.logits.dtype == jnp.float32


def test_unknown_net_lists_the_known_ones():
  with pytest.raises(InputError, match=r"'vgg16'.*resnet18.*scene_resnet"):
    nets.build('vgg16')


@pytest.mark.parametrize('form', ['printed', 'smooth'])
def test_half_precision_has_the_derivatives_of_full(form):
  """z² is beyond float16 from 256 on, and the closed form near 0."""
  z = np.array([-300.0, -1.0, 0.0, 0.01, 300.0])
  step = jax.grad(lambda v: soft_relu(v, 1e-4, form))
  for derivative in (step, jax.grad(step)):
    half, full = (
      np.asarray(jax.vmap(derivative)(jnp.asarray(z, t))) for t in ('float16', 'float32')
    )
    np.testing.assert_allclose(np.float32(half), full, rtol=2e-3, atol=1e-4)
