"""Every interpreter keeps the contract; each agrees with its formula and with PyTorch's numbers."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import PARITY
from parity.weights import numpy_weights

from adv2_jax import interpreters, losses, nets
from adv2_jax.attacks import presets
from adv2_jax.classifier import from_linen
from adv2_jax.interpreters.gradient import path_attribution
from adv2_jax.types import InputError
from adv2_jax.weights import zoo

CLF = tiny.classifier()
X = tiny.images(4)
Y = jnp.array([0, 3, 4, 2])
KEYS = jax.vmap(jax.random.key)(jnp.arange(4))
KEY = jax.random.key(0)
every_interpreter = pytest.mark.parametrize('name', interpreters.FACTORIES)


@functools.cache
def explain(name):
  interpreter = interpreters.build(name, tiny.SIZE)
  return jax.jit(interpreter.explain)


def wanted(maps):
  return jnp.asarray(np.random.RandomState(2).rand(*maps.shape), jnp.float32)


@functools.cache
def attacked(name):
  """(clf, x, weights [B]) -> what `unroll` gives, and the gradient of Σ weight · its distance."""
  interpreter = interpreters.build(name, tiny.SIZE)

  @jax.jit
  def run(clf, x, weights):
    benign = jax.lax.stop_gradient(interpreter.explain(clf, 1 - x, Y, KEYS))
    carry = interpreter.begin(clf, 1 - x, Y, benign, KEYS)

    def loss(x):
      seen = interpreter.unroll(clf, x, Y, carry, KEYS)
      if seen.distance is not None:
        return jnp.sum(weights * seen.distance), seen
      assert seen.maps.ndim == 4
      (maps,) = seen.maps
      return jnp.sum(weights * losses.map_mse(maps, wanted(maps))), seen

    return jax.grad(loss, has_aux=True)(x)[::-1]

  return run


# --- the contract ---------------------------------------------------------------------------------


@every_interpreter
def test_maps_are_square_in_the_unit_interval_and_not_flat(name):
  maps = explain(name)(CLF, X, Y, KEYS)
  assert maps.shape == (4, 8, 8)
  assert maps.dtype == jnp.float32
  assert float(maps.min()) >= 0
  if name == 'mask':  # nothing is marked where the class is gone as soon as the image is blurred
    assert float(maps.std((1, 2)).max()) > 0.05
  else:
    np.testing.assert_allclose(maps.max((1, 2)), 1, atol=1e-6)
    assert float(maps.std((1, 2)).min()) > 0.05


@pytest.mark.parametrize('name', ['cam', 'grad'])
def test_jit_and_eager_agree(name):
  interpreter = interpreters.build(name, tiny.SIZE)
  eager = interpreter.explain_fn((), CLF, X, Y, KEYS)
  np.testing.assert_allclose(explain(name)(CLF, X, Y, KEYS), eager, atol=1e-4)
  np.testing.assert_array_equal(
    interpreter.explain(CLF, X, Y, KEYS), explain(name)(CLF, X, Y, KEYS)
  )


def test_a_net_is_no_classifier():
  with pytest.raises(InputError, match=r'TinyNet; make a classifier of it: from_linen'):
    interpreters.cam().explain(tiny.TinyNet(), X, Y, KEY)


@every_interpreter
def test_called_again_it_traces_nothing(name):
  """Outside of a trace it jits itself."""
  clf, traces = tiny.counted(CLF)
  interpreter = interpreters.build(name, tiny.SIZE)
  interpreter.explain(clf, X, Y, KEY)
  once = len(traces)
  interpreter.explain(clf, X[::-1], Y, KEYS)
  assert len(traces) == once > 0


@every_interpreter
def test_other_rows_do_not_matter(name):
  """Neither further rows, such as padding, nor the order of rows, nor one's place among them."""
  maps = explain(name)(CLF, X, Y, KEYS)
  fewer = explain(name)(CLF, X[:3], Y[:3], KEYS[:3])
  np.testing.assert_allclose(maps[:3], fewer, atol=1e-5)
  order = np.array([2, 0, 3, 1])
  moved = explain(name)(CLF, X[order], Y[order], KEYS[order])
  np.testing.assert_allclose(moved, maps[order], atol=1e-5)


@every_interpreter
def test_the_map_s_gradient_is_finite_and_not_zero_and_stays_in_its_row(name):
  g = np.asarray(attacked(name)(CLF, X, jnp.ones(4))[1])
  assert np.isfinite(g).all()
  assert np.abs(g).max((1, 2, 3)).min() > 1e-6
  alone = np.asarray(attacked(name)(CLF, X, jnp.array([0.0, 1, 0, 0]))[1])
  np.testing.assert_allclose(alone[1], g[1], rtol=1e-3, atol=1e-6)
  assert not alone[[0, 2, 3]].any()


@every_interpreter
def test_the_map_in_the_attack_is_the_real_one_where_it_says_so(name):
  """`exact` is trusted when the best iterate is chosen; the others must come close."""
  seen = attacked(name)(CLF, X, jnp.ones(4))[0]
  if seen.maps is None:
    pytest.skip('it has no map in the attack')
  error = np.abs(seen.maps[0] - explain(name)(CLF, X, Y, KEYS))
  if interpreters.build(name, tiny.SIZE).exact:
    assert error.max() < 1e-5
  else:
    assert 1e-4 < error.mean() < 0.1


@every_interpreter
def test_one_trace_for_two_batches(name):
  clf, traces = tiny.counted(CLF)
  interpreter = interpreters.build(name, tiny.SIZE)
  run = jax.jit(lambda clf, x, y, keys: interpreter.explain(clf, x, y, keys))
  jax.eval_shape(run, clf, X, Y, KEYS)
  once = len(traces)
  jax.eval_shape(run, clf, X[::-1], Y[::-1], KEYS[::-1])
  assert len(traces) == once > 0


@every_interpreter
def test_the_logits_beside_the_map_are_the_classifier_s(name):
  """The attack takes its prediction loss from them."""
  seen = attacked(name)(CLF, X, jnp.ones(4))[0]
  np.testing.assert_allclose(seen.logits, tiny.outputs(CLF, X).logits, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(seen.extra, np.zeros(4))


# --- GRAD -----------------------------------------------------------------------------------------


def min_max(maps):
  maps = np.asarray(maps, np.float64)
  low, high = (f(maps, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
  return (maps - low) / (high - low)


def pooled(maps, size=2):
  b, h, w = maps.shape
  return np.asarray(maps, np.float64).reshape(b, h // size, size, w // size, size).mean((2, 4))


def input_gradient(score, clf=CLF, x=X):
  return np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(score(clf(x).logits))))(x))


def class_logit(logits):
  return logits[jnp.arange(len(logits)), Y]


def test_grad_is_the_largest_absolute_derivative_over_channels():
  nll = input_gradient(lambda z: -class_logit(jax.nn.log_softmax(z)))
  logit = input_gradient(class_logit)
  for of, g in (('nll', nll), ('logit', logit)):
    maps = jax.jit(interpreters.grad(pool=2, of=of).explain)(CLF, X, Y, KEY)
    np.testing.assert_allclose(maps, min_max(pooled(np.abs(g).max(-1))), atol=1e-4)
  assert np.abs(min_max(pooled(np.abs(nll).max(-1))) - maps).mean() > 0.01  # the two differ


def scaled(clf, factor, shift):
  """The classifier with logits factor · z + shift."""

  def through(fn):
    def call(params, x, **kwargs):
      out = fn(params, x, **kwargs)
      return out._replace(logits=out.logits * factor + shift)

    return call

  return clf.replace(apply_fn=through(clf.apply_fn), surrogate_fn=through(clf.surrogate_fn))


def test_logit_maps_do_not_depend_on_the_logits_scale():
  run = jax.jit(interpreters.grad(pool=2, of='logit').explain)
  other = run(scaled(CLF, 1e-3, 2.0), X, Y, KEY)
  np.testing.assert_allclose(other, run(CLF, X, Y, KEY), atol=1e-5)


def test_nll_maps_survive_a_certain_prediction():
  """At p_y = 1 − 1e-35 the derivative of −log_softmax is 0 and its map 0/0."""
  y = jnp.full(4, 2)
  bias = jnp.zeros((1, tiny.CLASSES)).at[0, 2]
  interpreter = interpreters.grad(pool=2)
  run = jax.jit(lambda clf: interpreter.explain(clf, X, y, KEY))
  soft = jax.jit(jax.grad(lambda x, clf: interpreter.unroll(clf, x, y, (), KEY).maps.sum()))
  sure = scaled(CLF, 1.0, bias.set(80.0))
  np.testing.assert_allclose(run(sure), run(scaled(CLF, 1.0, bias.set(1.0))), atol=1e-4)
  assert float(jnp.abs(soft(X, sure)).max()) > 1e-4


@pytest.mark.parametrize('of', ['nll', 'logit'])
def test_second_order_gradient_against_finite_differences(of):
  """On a smooth net, where the surrogate is the net itself and the derivative can be checked."""
  clf = tiny.classifier(act=nn.softplus)
  interpreter = interpreters.grad(pool=2, of=of)
  target = wanted(np.zeros((4, 8, 8)))

  @jax.jit
  def loss(x):
    return losses.map_sse(interpreter.unroll(clf, x, Y, (), KEY).maps[0], target)

  real = losses.map_sse(jax.jit(interpreter.explain)(clf, X, Y, KEY), target)
  np.testing.assert_allclose(loss(X), real, rtol=1e-4)
  g = np.float64(jax.grad(lambda x: loss(x).sum())(X))
  direction = g / np.linalg.norm(g.reshape(4, -1), axis=1).reshape(4, 1, 1, 1)
  h = 2e-3
  up, down = (np.float64(loss(jnp.float32(X + s * h * direction))) for s in (1, -1))
  np.testing.assert_allclose((up - down) / (2 * h), (g * direction).sum((1, 2, 3)), rtol=0.05)


# --- CAM, Grad-CAM --------------------------------------------------------------------------------


def raw_cam():
  features = np.float64(tiny.outputs(CLF, X).taps['features'])
  weights = np.float64(CLF.params['params']['fc']['kernel'])[:, Y]  # [F,B]
  return np.einsum('bhwf,fb->bhw', features, weights)


def test_cam_weighs_the_features_by_the_last_layer():
  np.testing.assert_allclose(explain('cam')(CLF, X, Y, KEY), min_max(raw_cam()), atol=1e-5)


def test_grad_cam_is_the_positive_part_of_cam_where_both_are_defined():
  positive = np.maximum(raw_cam(), 0)
  expected = positive / positive.max((1, 2), keepdims=True)
  np.testing.assert_allclose(explain('grad_cam')(CLF, X, Y, KEY), expected, atol=1e-5)


@pytest.mark.parametrize('compiled', [False, True])
def test_cam_refuses_a_head_that_does_not_pool(compiled):
  """Also under jit, where the parameters are not known; Grad-CAM takes such a head."""
  flat = tiny.classifier(pools=False)
  call = jax.jit(interpreters.cam().explain) if compiled else interpreters.cam().explain
  with pytest.raises(InputError, match=r'global average pooling.*interpreters\.grad_cam'):
    call(flat, X, Y, KEY)
  assert float(explain('grad_cam')(flat, X, Y, KEY).max()) == 1


@pytest.mark.parametrize('shift', [0.0, -9.0])
def test_cam_takes_a_head_with_a_batch_norm_behind_the_pooling(shift):
  """Made-up variances must be positive; where even they give no number (−9), it cannot be told."""
  fc = CLF.params['params']['fc']['kernel']
  params = (CLF.params, {'mean': jnp.ones(6), 'var': jnp.ones(6) + shift, 'kernel': fc})

  def head(params, features):
    norm = params[1]
    pooled = features.mean((1, 2)) - norm['mean'].reshape(1, -1)
    return pooled / jnp.sqrt(norm['var'].reshape(1, -1) + shift) @ norm['kernel']

  clf = CLF.replace(
    params=params, apply_fn=lambda p, x: CLF.apply_fn(p[0], x), head_fn=head, surrogate_fn=None
  )
  assert jax.eval_shape(interpreters.cam().explain, clf, X, Y, KEY).shape == (4, 8, 8)


def squeezed(act):
  """SqueezeNet's end: the features go through a convolution, `act` and the pooling."""
  weights = jnp.asarray(np.random.RandomState(0).randn(6, tiny.CLASSES), jnp.float32)

  def head(params, features):
    return act(jnp.einsum('bhwf,fk->bhwk', features, params[1])).mean((1, 2))

  return CLF.replace(
    params=(CLF.params, weights),
    apply_fn=lambda p, x: CLF.apply_fn(p[0], x),
    head_fn=head,
    surrogate_fn=None,
  )


def test_cam_refuses_a_head_that_bends_before_it_pools():
  """Positive numbers alone would not show it: each ReLU is on."""
  with pytest.raises(InputError, match='global average pooling'):
    jax.eval_shape(interpreters.cam().explain, squeezed(nn.relu), X, Y, KEY)
  straight = jax.eval_shape(interpreters.cam().explain, squeezed(lambda z: z), X, Y, KEY)
  assert straight.shape == (4, 8, 8)


def test_taps_without_features_are_named():
  clf = CLF.replace(apply_fn=lambda p, x: CLF.apply_fn(p, x)._replace(taps={'last': x}))
  for name in ('cam', 'grad_cam'):
    with pytest.raises(InputError, match=r"taps hold \['last'\]; .*'features'"):
      jax.eval_shape(interpreters.build(name).explain, clf, X, Y, KEY)


@pytest.mark.parametrize('name', ['cam', 'grad_cam', 'grad'])
def test_a_map_of_one_cell_is_refused(name):
  """Every map would be the same, and every attack perfect."""
  x, options = (X, {'pool': tiny.SIZE}) if name == 'grad' else (X[:, :2, :2], {})
  interpreter = interpreters.FACTORIES[name](**options)
  for call in (interpreter.explain, lambda *v: interpreter.unroll(*v[:3], (), v[3])):
    with pytest.raises(InputError, match=f'{name} makes maps of a single cell') as error:
      jax.eval_shape(call, CLF, x, Y, KEY)
    assert f'{x.shape[1]}×{x.shape[1]} pixels' in str(error.value)


def test_grad_cam_without_positive_evidence_is_zero():
  flat = scaled(CLF, 0.0, 1.0)
  silent = flat.replace(head_fn=lambda p, a: 0 * CLF.head_fn(p, a))
  maps = explain('grad_cam')(silent, X, Y, KEY)
  np.testing.assert_array_equal(maps, np.zeros((4, 8, 8)))


# --- the further gradient methods -----------------------------------------------------------------


def test_integrated_gradients_are_complete():
  """They sum to z(x) − z(0): a wrong path, weight or end point would show."""
  attribute = jax.jit(lambda clf, x: path_attribution(lambda v: clf(v).logits, x, Y, 64))
  total = attribute(CLF, X).sum((1, 2, 3))
  ends = [np.float64(class_logit(tiny.outputs(CLF, x).logits)) for x in (X, 0 * X)]
  np.testing.assert_allclose(total, ends[0] - ends[1], rtol=0.02, atol=0.01)


def test_on_a_linear_model_both_are_input_times_weight():
  clf, x = tiny.linear_classifier(), tiny.images(4, size=4)
  weights = np.moveaxis(np.asarray(clf.params), -1, 0)[Y]
  expected = min_max(np.abs((x * weights).sum(-1)))
  for interpreter in (
    interpreters.input_x_gradient(pool=1),
    interpreters.integrated_gradients(pool=1, steps=3),
  ):
    maps = jax.jit(interpreter.explain)(clf, x, Y, KEY)
    np.testing.assert_allclose(maps, expected, atol=1e-5)


def test_smooth_grad_without_noise_is_grad_of_the_logit():
  smooth = jax.jit(interpreters.smooth_grad(pool=2, samples=2, sigma=0.0).explain)
  plain = jax.jit(interpreters.grad(pool=2, of='logit').explain)
  np.testing.assert_allclose(smooth(CLF, X, Y, KEY), plain(CLF, X, Y, KEY), atol=1e-5)


def test_smooth_grad_s_noise_is_its_key_s():
  maps = explain('smooth_grad')(CLF, X, Y, KEYS)
  np.testing.assert_array_equal(explain('smooth_grad')(CLF, X, Y, KEYS), maps)
  same, other = (KEYS[jnp.array(i)] for i in ([0, 0, 0, 0], [1, 1, 1, 1]))
  x, y = X[:1].repeat(4, 0), Y[:1].repeat(4)
  equal_keys = explain('smooth_grad')(CLF, x, y, same)
  np.testing.assert_allclose(equal_keys, maps[:1].repeat(4, 0), atol=1e-5)
  assert np.abs(explain('smooth_grad')(CLF, x, y, other) - equal_keys).mean() > 1e-3


# --- what they share ------------------------------------------------------------------------------


def test_a_constant_map_is_zero_and_has_no_nan_gradient():
  maps, vjp = jax.vjp(interpreters.min_max, jnp.full((2, 3, 3), 0.7))
  assert not maps.any()
  assert np.isfinite(vjp(jnp.ones_like(maps))[0]).all()


def test_pooling_averages_cells_and_cuts_a_ragged_rim():
  maps = np.random.RandomState(0).rand(2, 7, 9).astype(np.float32)
  np.testing.assert_allclose(
    interpreters.avg_pool(jnp.asarray(maps), 3), pooled(maps[:, :6, :9], 3), rtol=1e-6
  )


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: interpreters.grad(tau=0), 'tau is 0'),
    (lambda: interpreters.grad(form='soft'), "form is 'soft'"),
    (lambda: interpreters.grad(of='loss'), "of is 'loss'"),
    (lambda: interpreters.integrated_gradients(steps=0), 'steps is 0'),
    (lambda: interpreters.smooth_grad(samples=0), 'samples=0'),
    (lambda: interpreters.smooth_grad(sigma=-1.0), 'sigma=-1'),
    (lambda: interpreters.build('gradcam'), "'gradcam' is unknown; expected one of grad, cam"),
    (lambda: interpreters.grad(pool=0).explain(CLF, X, Y, KEY), 'pool is 0; expected 1 to 16'),
    (lambda: interpreters.smooth_grad(pool=17).explain(CLF, X, Y, KEY), 'pool is 17'),
  ],
)
def test_bad_settings(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_cells_are_four_pixels_on_large_images_and_two_on_small_ones():
  for size, cells in ((224, 56), (64, 32), (32, 16)):
    maps = jax.eval_shape(
      interpreters.build('grad', size).explain, CLF, jnp.zeros((1, size, size, 3)), Y[:1], KEY
    )
    assert maps.shape == (1, cells, cells)


@every_interpreter
@pytest.mark.parametrize(
  ('x', 'y', 'message'),
  [
    (X, [99, 0, 0, 0], 'y of image 0 is 99; the classifier has the classes 0…4'),
    (X, -1, r'y has shape \(\)'),
    (X, jax.nn.one_hot(Y, 5), 'y is float32; expected integers'),
    (X * 255, Y, 'divide 0…255 images by 255'),
    (X[0], Y, r'x\[None\]'),
    (X.at[1].set(jnp.nan), Y, 'image 1 has NaN'),
  ],
)
def test_bad_images_and_classes_are_refused_by_all_alike(name, x, y, message):
  with pytest.raises(InputError, match=message):
    interpreters.build(name, tiny.SIZE).explain(CLF, x, y, KEYS)


@every_interpreter
@pytest.mark.parametrize('preset', ['fast', 'authors'])
def test_types_do_not_depend_on_jax_s_default(name, preset):
  """Traced only: maps, and a step of the attack, whose state keeps its types."""
  interpreter = interpreters.build(name, tiny.SIZE)
  recipe = presets.by_name(preset, name, steps_s1=0, steps_s2=1)

  def run(clf, x):
    maps = interpreter.explain(clf, x, Y, KEY)
    batch = tiny.batch(x, Y, maps)
    ((_, _), (attack, _)) = recipe.schedule(clf, interpreter, recipe.perturbation(0.1), KEY)
    state, _ = attack.step(batch, attack.init(batch, None))
    return maps, attack.result(batch, state)

  with jax.enable_x64(True):
    for found in jax.eval_shape(run, CLF, X):
      assert found.dtype == jnp.float32


@every_interpreter
def test_the_same_settings_give_the_same_object(name):
  """A new one would be compiled anew."""
  factory = interpreters.FACTORIES[name]
  assert factory() is factory()
  default = {'grad': {'pool': 4}, 'mask': {'looks': 2}, 'smooth_grad': {'samples': 8}}.get(name, {})
  assert factory(**default) is factory()
  for setting in default:
    assert factory(**{setting: 3}) is factory(**{setting: 3}) is not factory()
  assert interpreters.grad(4) is interpreters.grad(pool=4)
  assert interpreters.grad(4) is not interpreters.grad(pool=4.0)  # which fails, and must not stay


def test_an_own_interpreter_is_a_formula():
  """`from_map` with params: the map is θ·|x|, and its params are seen by both functions."""
  brightness = interpreters.from_map(
    lambda theta, clf, x, y, keys: (theta * x.mean(-1), None), params=jnp.float32(0.5), name='mine'
  )
  x = tiny.images(2)
  np.testing.assert_allclose(brightness.explain(CLF, x, Y[:2], KEY), x.mean(-1) / 2, rtol=1e-6)
  seen = brightness.replace(params=jnp.float32(1.0)).unroll(CLF, x, Y[:2], (), KEY)
  np.testing.assert_allclose(seen.maps[0], x.mean(-1), rtol=1e-6)
  assert seen.logits is None


# --- parity with PyTorch --------------------------------------------------------------------------


@functools.cache
def golden_classifier(name):
  golden = np.load(PARITY / f'{name}.npz')
  module = nets.build(name)
  tensors = numpy_weights(json.loads(str(golden['shapes'])), int(golden['seed']))
  x = np.random.RandomState(1).rand(2, 224, 224, 3).astype(np.float32)
  return from_linen(module, zoo.load_variables(module, tensors)), jnp.asarray(x), golden


def assert_maps_agree(maps, golden):
  """1e-3, but for the few cells that see a ReLU whose input is 0 to rounding.

  In ResNet-18's second image such a unit is on in torch and off here, as it is in float64; in
  DenseNet-121's first image one is off in torch and in float64 and on here.
  """
  difference = np.abs(maps - golden)
  assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(golden)
  assert (difference > 1e-3).mean() < 5e-3
  assert difference.max() < 5e-3


@pytest.mark.parametrize(
  'name',
  [
    'resnet18',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('resnet34', 'resnet50', 'resnet101', 'densenet121', 'densenet169')
    ),
  ],
)
def test_cam_and_grad_agree_with_torch(name):
  """The goldens' GRAD is by the image in [0,1], the normalisation being part of the net."""
  clf, x, golden = golden_classifier(name)
  y = jnp.array([3, 7])
  for interpreter, field in ((interpreters.cam(), 'cam'), (interpreters.grad(), 'grad_map')):
    maps = jax.jit(interpreter.explain)(clf, x, y, KEY)
    assert_maps_agree(maps, golden[field])


@pytest.mark.parametrize('name', ['resnet18', pytest.param('densenet121', marks=pytest.mark.slow)])
def test_the_second_order_path_agrees_with_torch(name):
  clf, x, golden = golden_classifier(name)
  y = jnp.array([3, 7])
  target = jnp.asarray(np.random.RandomState(5).rand(2, 56, 56), jnp.float32)

  @jax.jit
  def run(clf, x):
    def loss(x):
      maps = interpreters.grad().unroll(clf, x, y, (), KEY).maps[0]
      error = losses.map_sse(maps, target)
      return error.sum(), (maps, error)

    return jax.grad(loss, has_aux=True)(x)

  g, (maps, error) = run(clf, x)
  assert_maps_agree(maps, golden['soft_map'])
  np.testing.assert_allclose(error, golden['soft_map_error'], rtol=1e-4)
  expected = golden['soft_map_error_grad_x']
  difference = np.linalg.norm((g[:, ::4, ::4] - expected).reshape(2, -1), axis=1)
  assert (difference < 5e-3 * np.linalg.norm(expected.reshape(2, -1), axis=1)).all(), difference
