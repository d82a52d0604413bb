"""Adapters give one and the same classifier; check_classifier finds each way to be a bad one."""

import copy
import functools
import pickle
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from adv2_jax import check_classifier, from_fn, from_linen, from_nnx, interpreters
from adv2_jax.classifier import require
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
  class NoAct(nn.Module):
    @nn.compact
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


# --- activations other than ReLU ------------------------------------------------------------------


class Block(nn.Module):
  features: int
  stride: int = 1
  act: Callable[[jax.Array], jax.Array] = nn.relu6

  @nn.compact
  def __call__(self, x):
    return self.act(nn.Conv(self.features, (3, 3), self.stride, name='conv')(x))


class InnerBlocks(nn.Module):
  """Has no field itself; one block is made in setup, one in the call, and is checkpointed."""

  def setup(self):
    self.first = Block(8, 2)
    self.fc = nn.Dense(tiny.CLASSES)

  @nn.compact
  def __call__(self, x, train):
    del train
    features = nn.remat(Block)(6, name='second')(self.first(x))
    return self.head(features), {'features': features}

  def head(self, features):
    return self.fc(features.mean((1, 2)))


class InSequence(nn.Module):
  """Functions in a list; the head is a module."""

  def setup(self):
    layers = [nn.Conv(8, (3, 3), 2), nn.relu6, nn.Conv(6, (3, 3)), nn.relu6]
    self.body = nn.Sequential(layers)
    self.head = nn.Sequential([lambda a: a.mean((1, 2)), nn.Dense(tiny.CLASSES)])

  def __call__(self, x, deterministic=False):
    features = self.body(x)
    return self.head(features), {'features': features}


class NnxSequence(NnxNet):
  def __init__(self, params):
    super().__init__(params)
    act = nnx.relu6
    self.act, self.body = None, nnx.Sequential(self.conv1, act, self.conv2, act)

  def __call__(self, x):
    features = self.body(x)
    return self.head(features), {'features': features}


def relu6_nets(params):
  """`tiny.TinyNet` with ReLU6, the activation hidden in different places."""
  conv1, conv2, fc = (params[name] for name in ('conv1', 'conv2', 'fc'))
  blocks = {'first': {'conv': conv1}, 'second': {'conv': conv2}, 'fc': fc}
  sequence = {'body': {'layers_0': conv1, 'layers_2': conv2}, 'head': {'layers_1': fc}}
  model = NnxNet(params)
  model.act = nnx.relu6
  return {
    'field': lambda: from_linen(tiny.TinyNet(act=nn.relu6), {'params': params}, **STATS),
    'inner blocks': lambda: from_linen(InnerBlocks(), {'params': blocks}, **STATS),
    'sequence': lambda: from_linen(InSequence(), {'params': sequence}, **STATS),
    'nnx field': lambda: from_nnx(model, **STATS),
    'nnx sequence': lambda: from_nnx(NnxSequence(params), **STATS),
  }


@functools.cache
def by_hand():
  """The attack's gradient through ReLU6 = soft(z) − soft(z − 6), written as plain functions."""
  params, apply, head, _ = plain_functions(tiny.classifier().params['params'])

  def surrogate(p, x, act=soft_relu):
    return apply(p, x, lambda z: act(z) - act(z - 6))

  return map_gradient(from_fn(params, lambda p, x: apply(p, x, nn.relu6), head, surrogate))


def map_gradient(clf):
  interpreter = interpreters.grad(pool=2, tau=1e-2, form='smooth')

  @jax.jit
  def run(clf, x):
    return jax.grad(lambda v: interpreter.unroll(clf, v, Y, (), jax.random.key(0)).maps.sum())(x)

  return np.asarray(run(clf, 3 * X))  # 3: far enough for the kink at 6


@pytest.mark.parametrize('where', relu6_nets(tiny.classifier().params['params']))
def test_relu6_is_smoothed_wherever_it_stands(where):
  clf = relu6_nets(tiny.classifier().params['params'])[where]()
  expected = by_hand()
  np.testing.assert_allclose(map_gradient(clf), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(('act', 'name'), [(jnp.sign, 'sign'), (nn.PReLU(), 'PReLU')])
def test_activations_that_cannot_be_told_are_warned_of(act, name):
  """A step; a layer with a slope of its own."""
  params = tiny.classifier().params
  with pytest.warns(UserWarning, match=rf'TinyNet\.act is {name}, whose kinks cannot be told'):
    from_linen(tiny.TinyNet(act=act), params)
  model = NnxNet(params['params'])
  model.act = act
  with pytest.warns(UserWarning, match=rf'NnxNet\.act is {name}'):
    from_nnx(model)


# --- what is kept of a model ----------------------------------------------------------------------


def test_the_user_s_model_stays_as_it_is_and_later_changes_do_not_matter():
  model = NnxNet(tiny.classifier().params['params'], dropout=0.5)
  model.train()
  clf = from_nnx(model, **STATS)
  assert not model.dropout.deterministic
  before = clf(X).logits
  model.fc.kernel[...] *= 2
  np.testing.assert_array_equal(clf(X).logits, before)


@pytest.mark.parametrize('adapter', ['linen', 'fn'])
def test_numpy_parameters_are_copied(adapter):
  params = jax.tree.map(np.array, tiny.classifier().params)
  if adapter == 'linen':
    clf = from_linen(tiny.TinyNet(), params)
  else:
    clf = from_fn(*plain_functions(params['params']))
  before = jax.tree.map(np.array, clf.params)
  jax.tree.map(lambda v: v.fill(7), params)
  jax.tree.map(np.testing.assert_array_equal, clf.params, before)


def test_the_same_module_gives_the_same_functions():
  """Else every epoch's classifier would be traced, and kept, anew."""
  linen, nnx_ = (
    [make() for _ in range(2)]
    for make in (
      lambda: from_linen(tiny.TinyNet(), {'params': jnp.ones(2)}),
      lambda: from_nnx(NnxNet(tiny.classifier().params['params'])),
    )
  )
  for one, other in (linen, nnx_):
    for name in ('apply_fn', 'head_fn', 'surrogate_fn'):
      assert getattr(one, name) is getattr(other, name)
  assert from_linen(tiny.TinyNet(), (), mean=(0, 0, 0)).apply_fn is not linen[0].apply_fn
  assert from_linen(tiny.TinyNet(pools=False), ()).apply_fn is not linen[0].apply_fn


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_logits_are_float32_whatever_the_net_computes_in(dtype):
  params, apply, head, surrogate = plain_functions(
    jax.tree.map(lambda v: v.astype(dtype), tiny.classifier().params['params'])
  )
  half = lambda fn: lambda p, x, **kwargs: fn(p, x.astype(dtype), **kwargs)  # noqa: E731
  clf = from_fn(params, half(apply), head, half(surrogate))
  out = jax.eval_shape(clf, X)
  assert out.taps['features'].dtype == dtype
  soft = jax.eval_shape(clf.surrogate, X).logits
  for logits in (out.logits, soft, jax.eval_shape(clf.head, out.taps['features'])):
    assert logits.dtype == jnp.float32
  for interpreter in (interpreters.cam(), interpreters.grad_cam(), interpreters.grad(pool=2)):
    maps = jax.eval_shape(interpreter.explain, clf, X, Y, jax.random.key(0))
    assert maps.dtype == jnp.float32


def test_copies_work_and_pickle_says_what_to_do():
  clf = tiny.classifier()
  assert copy.deepcopy(clf).apply_fn is clf.apply_fn
  decoder = interpreters.Decoder((), from_fn({}, len, len, len).apply_fn, 5)
  made = [interpreters.build(name) for name in interpreters.FACTORIES]
  for thing in (clf, decoder, interpreters.rts(decoder), *made):
    with pytest.raises((pickle.PicklingError, AttributeError), match='pickle the params'):
      pickle.dumps(thing)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('stats', 'words'),
  [
    ({'std': (0.2, 0.0, 0.2)}, 'std is'),
    ({'std': (0.2, np.nan, 0.2)}, 'std is'),
    ({'std': (58.4, 57.1, 57.4)}, 'std is .*divide them by 255'),
    ({'mean': (123.675, 116.28, 103.53)}, 'mean is .*divide them by 255'),
    ({'mean': (-2.1, 0.5, 0.5)}, 'mean is'),
    ({'mean': (0.5,)}, 'std is .*; expected one number'),
    ({'mean': ()}, 'mean is'),
  ],
)
@pytest.mark.parametrize('adapter', ['linen', 'nnx'])
def test_mean_and_std_are_those_of_images_in_the_unit_interval(adapter, stats, words):
  make = from_nnx if adapter == 'nnx' else functools.partial(from_linen, variables={})
  with pytest.raises(InputError, match=words):
    make(NnxNet({}) if adapter == 'nnx' else tiny.TinyNet(), **stats)


@pytest.mark.parametrize('stats', [{}, {'mean': (0.5,), 'std': (0.2,)}])
def test_means_that_do_not_fit_the_channels_are_named(stats):
  """The three usual ones would make three channels of a grey image's one."""
  clf = from_linen(tiny.TinyNet(), tiny.classifier().params, **stats)
  channels = 3 if stats else 1
  with pytest.raises(InputError, match=f'have {channels} channels, mean {4 - channels} and std'):
    jax.eval_shape(clf, X[..., :channels])


@pytest.mark.parametrize('takes', ['train', 'deterministic', 'use_running_average'])
@pytest.mark.parametrize('default', [True, False, None])
def test_modules_are_told_that_they_are_not_trained(takes, default):
  """By an argument, required (None) or not, of the call or the head, or by a field."""
  code = f"""
class Net(nn.Module):
  {takes}: bool = {default}
  def __call__(self, x, {takes}{'' if default is None else f'={default}'}):
    return self.head(x, {takes}), {{'features': x}}
  def head(self, x, {takes}):
    assert {takes} is self.{takes} is {takes != 'train'}
    return x.mean((1, 2))
"""
  space = {'nn': nn}
  exec(code, space)
  with pytest.warns(UserWarning, match='plain ReLU'):
    clf = from_linen(space['Net'](), {})
  clf.head(clf(X).taps['features'])


def test_an_argument_of_unknown_meaning_is_named():
  class Net(nn.Module):
    def __call__(self, x, mask):
      return x

  with pytest.raises(InputError, match="Net needs the argument 'mask'"):
    from_linen(Net(), {})


class Returns(nn.Module):
  what: str
  act: Callable = nn.relu

  def __call__(self, x):
    logits = x.mean((1, 2))
    return {'logits': logits, 'three': (logits, x, x), 'taps': (logits, x), 'vector': (x, {})}[
      self.what
    ]


class NnxReturns(nnx.Module):
  def __init__(self, what):
    self.what, self.act = what, nn.relu

  def __call__(self, x):
    return Returns(self.what).apply({}, x)


@pytest.mark.parametrize(
  ('what', 'found'),
  [
    ('logits', r'returned an array \[3, 3\]'),
    ('three', r'returned \(.*, .*, .*\)'),
    ('taps', r'returned \(.*, .*\)'),
    ('vector', r'returned an array \[3, 16, 16, 3\] for logits'),
    ('head', 'has no head'),
  ],
)
def test_each_adapter_shows_what_a_model_must_return(what, found):
  module, model = Returns(what), NnxReturns(what)
  fn = lambda p, x: module.apply({}, x)  # noqa: E731
  for name, clf in (
    ('Returns', from_linen(module, {})),
    ('NnxReturns', from_nnx(model)),
    ('<lambda>', from_fn({}, fn, None, fn)),
  ):
    calls = [clf.head] if what == 'head' else [clf, clf.surrogate]
    for call in calls:
      with pytest.raises(InputError, match=found) as error:
        call(X)
      assert name in str(error.value) or 'surrogate' in str(error.value)
      assert "return logits, {'features': a}" in str(error.value)
      assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: from_linen(NnxReturns('x'), {}), 'module is an NNX module, NnxReturns.*from_nnx'),
    (lambda: from_linen(tiny.TinyNet, {}), 'the class TinyNet; give an instance'),
    (lambda: from_nnx(tiny.TinyNet()), 'model is a Linen module, TinyNet.*from_linen'),
    (lambda: from_fn({}, tiny.TinyNet(), None, None), 'apply_fn is a Linen module'),
    (lambda: from_fn({}, None, None, None), 'apply_fn is of type NoneType'),
    (lambda: require(tiny.TinyNet()), r'a Linen module, TinyNet; .*from_linen\(module, variables'),
    (lambda: require(NnxReturns('x')), 'an NNX module, NnxReturns; .*from_nnx'),
    (lambda: require(lambda x: x), 'a function; .*from_fn'),
    (lambda: require({'params': X}), 'of type dict; expected what load_classifier'),
  ],
)
def test_what_is_no_classifier_is_told_what_makes_one(make, words):
  """By its kind and name: a dump of a module's arrays would bury the message."""
  with pytest.raises(InputError, match=words) as error:
    make()
  assert len(str(error.value)) < 160


def test_a_classifier_is_what_is_required():
  assert require(tiny.classifier()) is tiny.classifier()


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


def test_a_mode_that_is_field_and_argument_is_given_once():
  """Flax's own idiom, `merge_param`, refuses both."""

  class Net(nn.Module):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic=None):
      off = nn.merge_param('deterministic', self.deterministic, deterministic)
      x = nn.Dropout(0.5, deterministic=off)(x)
      return x.mean((1, 2)), {'features': x}

    def head(self, features):
      return features.mean((1, 2))

  for field in (None, True, False):
    with pytest.warns(UserWarning, match='no surrogate_fn'):
      clf = from_linen(Net(field), {}, mean=(0.5,) * 3, std=(1.0,) * 3)
    assert jax.eval_shape(clf, X).logits.shape == (len(X), 3)


def test_pooling_in_a_sequential_is_no_activation():
  """A net with ReLUs that cannot be seen is warned of all the same."""

  class Net(nn.Module):
    def setup(self):
      self.last = nn.Sequential([lambda a: a.mean((1, 2)), nn.Dense(4)])
      self.conv = nn.Conv(3, (3, 3))

    def __call__(self, x):
      features = nn.relu(self.conv(x))
      return self.head(features), {'features': features}

    def head(self, features):
      return self.last(features)

  with pytest.warns(UserWarning, match='no surrogate_fn'):
    from_linen(Net(), {})


def test_the_same_functions_make_the_same_static_ones():
  apply = lambda p, x: (p * x.mean((1, 2)), {'features': x})  # noqa: E731
  head = lambda p, a: p * a.mean((1, 2))  # noqa: E731
  first, second = (from_fn(p, apply, head, apply) for p in (1.0, 2.0))
  assert first.apply_fn is second.apply_fn
  assert first.surrogate_fn is second.surrogate_fn
