"""Adapters give one and the same classifier; check_classifier finds each way to be a bad one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from adv2_jax import check_classifier, from_fn, from_linen, from_nnx, interpreters
from adv2_jax.nets import soft_relu
from adv2_jax.types import InputError, Outputs

X = tiny.images(3)
Y = jnp.array([0, 3, 4])
STATS = {'mean': (0.5,) * 3, 'std': (0.25,) * 3}


class NnxNet(nnx.Module):
  """`tiny.TinyNet` in NNX."""

  def __init__(self, params, dropout=0.0):
    rngs = nnx.Rngs(0)
    self.act = nnx.relu
    self.conv1 = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
    self.conv2 = nnx.Conv(8, 6, (3, 3), rngs=rngs)
    self.fc = nnx.Linear(6, tiny.CLASSES, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    for name, given in params.items():
      layer = getattr(self, name)
      layer.kernel[...], layer.bias[...] = given['kernel'], given['bias']

  def __call__(self, x):
    features = self.dropout(self.act(self.conv2(self.act(self.conv1(x)))))
    return self.head(features), {'features': features}

  def head(self, features):
    return self.fc(features.mean((1, 2)))


def plain_functions(params):
  """`tiny.TinyNet` as from_fn takes it, written without Flax."""

  def conv(layer, x, stride):
    y = jax.lax.conv_general_dilated(
      x, layer['kernel'], (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return y + layer['bias'].reshape(1, 1, 1, -1)

  def head(p, features):
    return features.mean((1, 2)) @ p['fc']['kernel'] + p['fc']['bias'][None]

  def apply(p, x, act=jax.nn.relu):
    features = act(conv(p['conv2'], act(conv(p['conv1'], (x - 0.5) / 0.25, 2)), 1))
    return head(p, features), {'features': features}

  return params, apply, head, lambda p, x, act=soft_relu: apply(p, x, act)


def adapted():
  """The same net through each adapter."""
  linen = tiny.classifier()
  params = linen.params['params']
  return {
    'linen': linen,
    'nnx': from_nnx(NnxNet(params), **STATS),
    'fn': from_fn(*plain_functions(params)),
  }


def test_the_adapters_agree():
  """In logits, head, the true gradient, and the surrogate's map gradient for two widths tau."""
  found = {}
  for name, clf in adapted().items():

    @jax.jit
    def all_of(clf, x):
      logits, taps = clf(x)
      plain = jax.grad(lambda v: clf(v).logits[:, 1].sum())(x)
      soft = [
        jax.grad(lambda v: g.unroll(clf, v, Y, (), jax.random.key(0)).maps.sum())(x)
        for g in (interpreters.grad(), interpreters.grad(tau=1e-2, form='smooth'))
      ]
      return logits, clf.head(taps['features']), plain, *soft

    found[name] = all_of(clf, X)
  for name in ('nnx', 'fn'):
    for ours, theirs in zip(found['linen'], found[name], strict=True):
      np.testing.assert_allclose(theirs, ours, atol=2e-4 * np.abs(ours).max(), err_msg=name)
  one, other = found['linen'][3:]
  assert np.abs(one - other).max() > 0.1 * np.abs(one).max()  # tau and form do something


def test_from_fn_without_a_surrogate_warns():
  params, apply, head, _ = plain_functions(tiny.classifier().params['params'])
  with pytest.warns(UserWarning, match='GRAD will attack with the plain ReLU derivative'):
    clf = from_fn(params, apply, head)
  assert clf.surrogate_fn is None
  surrogate = jax.jit(type(clf).surrogate)(clf, X)
  np.testing.assert_array_equal(surrogate.logits, tiny.outputs(clf, X).logits)


def test_a_module_without_act_warns():
  class NoAct(tiny.nn.Module):
    @tiny.nn.compact
    def __call__(self, x):
      return x.mean((1, 2)), {'features': x}

  with pytest.warns(UserWarning, match='soft_relu'):
    assert from_linen(NoAct(), {}).surrogate_fn is None


def test_a_surrogate_without_act_refuses_other_widths():
  params, apply, head, _ = plain_functions(tiny.classifier().params['params'])
  clf = from_fn(params, apply, head, lambda p, x: apply(p, x, soft_relu))
  key = jax.random.key(0)
  jax.eval_shape(lambda: interpreters.grad().unroll(clf, X, Y, (), key))
  with pytest.raises(InputError, match='has no `act` argument'):
    jax.eval_shape(lambda: interpreters.grad(tau=1e-2).unroll(clf, X, Y, (), key))


@pytest.mark.parametrize('adapter', ['linen', 'nnx'])
def test_the_surrogate_replaces_no_activation_but_relu(adapter):
  """Else GRAD would attack another net than the one it is given."""
  clf = tiny.classifier(act=jax.nn.gelu)
  if adapter == 'nnx':
    model = NnxNet(clf.params['params'])
    model.act = jax.nn.gelu
    clf = from_nnx(model, **STATS)
  surrogate = jax.jit(type(clf).surrogate)(clf, X)
  np.testing.assert_allclose(surrogate.logits, jax.jit(type(clf).__call__)(clf, X).logits, 1e-6)


@pytest.mark.parametrize('std', [(0.2, 0.0, 0.2), (0.2, -1.0, 0.2), (0.2, np.nan, 0.2)])
def test_std_must_be_positive(std):
  with pytest.raises(InputError, match='std is'):
    from_linen(tiny.TinyNet(), {}, std=std)


def test_dropout_is_off_and_its_random_state_in_nobody_s_way():
  """CAM looks into the parameters, among which NNX keeps random keys."""
  clf = from_nnx(NnxNet(tiny.classifier().params['params'], dropout=0.5), **STATS)
  check_classifier(clf, X)
  explain = jax.jit(interpreters.cam().explain)
  maps = explain(clf, X, Y, jax.random.key(0))
  expected = explain(tiny.classifier(), X, Y, jax.random.key(0))
  np.testing.assert_allclose(maps, expected, atol=1e-5)


# --- check_classifier -----------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['linen', 'nnx', 'fn'])
def test_good_classifiers_pass(name):
  check_classifier(adapted()[name], X)


def test_a_classifier_without_surrogate_or_global_pooling_passes():
  check_classifier(tiny.classifier(pools=False).replace(surrogate_fn=None), X)


def changed(**functions):
  """The tiny net with functions replaced; each gets (params, x or features, the old function)."""
  clf = tiny.classifier()

  def wrap(name, new):
    old = getattr(clf, name)
    return lambda params, x, **kwargs: new(lambda v: old(params, v, **kwargs), x)

  return clf.replace(**{name: wrap(name, new) for name, new in functions.items()})


def through(logits_of):
  """apply_fn whose logits go through a function."""

  def new(old, x):
    out = old(x)
    return Outputs(logits_of(out.logits), out.taps)

  return new


def host_noise(logits):
  rng = np.random.RandomState(0)
  draw = lambda z: z + rng.randn(*z.shape).astype(np.float32)  # noqa: E731
  shape = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
  return jax.experimental.io_callback(draw, shape, logits)


def python_noise():
  """Drawn when Python runs, as a framework's global generator would: jit freezes it."""
  rng = np.random.RandomState(0)
  return lambda logits: logits + rng.randn(*logits.shape).astype(np.float32)


def batch_norm(old, x):
  return old((x - x.mean((0, 1, 2), keepdims=True)) / x.std((0, 1, 2), keepdims=True))


BAD = {
  'probabilities': ({'apply_fn': through(jax.nn.softmax)}, 'probabilities; return the logits'),
  'noise on the host': ({'apply_fn': through(host_noise)}, 'two calls on the same images differ'),
  'noise in Python': ({'apply_fn': through(python_noise())}, 'two calls on the same images differ'),
  'batch statistics': ({'apply_fn': batch_norm}, 'depend on the others in its batch'),
  'NaN': ({'apply_fn': through(lambda z: z + jnp.nan)}, 'logits are not finite'),
  'one logit': ({'apply_fn': through(lambda z: z[:, 0])}, r'expected \[B,K\] with B=3'),
  'no features': ({'apply_fn': lambda old, x: Outputs(old(x).logits, {'last': x})}, "'features'"),
  'another head': ({'head_fn': lambda old, a: old(a) + 1}, 'head_fn'),
  'rounded input': (
    {'apply_fn': lambda old, x: old(jnp.round(x * 255) / 255)},
    'gradient of apply_fn by the image is zero',
  ),
  'rounded surrogate': (
    {'surrogate_fn': lambda old, x: old(jnp.round(x * 255) / 255)},
    'gradient of surrogate_fn by the image is zero',
  ),
  'another surrogate': (
    {'surrogate_fn': through(lambda z: z * 1.5)},
    'logits of surrogate_fn differ',
  ),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_classifiers_are_told_what_to_do(what):
  functions, message = BAD[what]
  with pytest.raises(InputError, match=message) as error:
    check_classifier(changed(**functions), X)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('x', 'message'),
  [
    (X[:1], 'at least 2 images'),
    (X * 255, 'divide 0…255 images by 255'),
    (X[0], r'expected \[B,H,W,C\]'),
  ],
)
def test_bad_images_for_the_check(x, message):
  with pytest.raises(InputError, match=message):
    check_classifier(tiny.classifier(), x)


@pytest.mark.parametrize(
  ('returned', 'message'),
  [
    (lambda z: z, '<lambda> returned a .*; expected the pair .logits, taps. with taps a dict'),
    (lambda z: (z, z), r'returned \(.*, .*\); expected the pair'),
  ],
)
def test_from_fn_tells_what_its_functions_must_return(returned, message):
  clf = from_fn((), lambda p, x: returned(x.mean((1, 2))), None, lambda p, x: None)
  with pytest.raises(InputError, match=message):
    clf(jnp.zeros((1, 4, 4, 3)))
