"""Tensors by their names, cards, built-in weights, and classifiers made of them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PARITY, shared_data
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.weights import numpy_weights
from weights_help import refusal, zoo_shapes

from adv2_jax import nets
from adv2_jax.weights import zoo
from adv2_jax.weights.zoo import load_classifier, load_variables

CARD = {
  'model': 'scene_resnet',
  'num_classes': 10,
  'mean': [0.5, 0.4, 0.3],
  'std': [0.2, 0.2, 0.2],
  'accuracy': 0.1,
  'command': 'none: random weights',
}


def without(tensors, name):
  return {k: v for k, v in tensors.items() if k != name}


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'name', [p.stem for p in sorted(PARITY.glob('*.npz')) if p.stem in nets.ZOO]
)
def test_names_and_shapes_are_torch_s(name):
  golden = json.loads(str(np.load(PARITY / f'{name}.npz')['shapes']))
  assert zoo_shapes(name) == {key: tuple(shape) for key, shape in golden.items()}


modules = st.from_regex(r'\A[a-z]{1,6}(\.?[0-9])?\Z').filter(lambda name: name != 'norm')
arrays = st.lists(st.integers(1, 4), min_size=4, max_size=4)


paths = st.lists(modules, min_size=1, max_size=3).map(tuple)


@given(st.dictionaries(paths, arrays, min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_names_and_layouts_round_trip(layers):
  """Any tree of convolutions, dense layers and norms comes back from its tensors as it was."""
  flat, count = {}, iter(range(10**6))

  def leaf(*shape):
    return np.float32([next(count) for _ in range(np.prod(shape))]).reshape(shape)

  for i, (path, (kh, kw, c, f)) in enumerate(layers.items()):
    path = (*path, f'kind{i}')
    if i % 3 == 0:
      flat['params', *path, 'kernel'] = leaf(kh, kw, c, f)
    elif i % 3 == 1:
      flat['params', *path, 'kernel'] = leaf(c, f)
      flat['params', *path, 'bias'] = leaf(f)
    else:
      for collection, name in [('params', 'scale'), ('params', 'bias')]:
        flat[collection, *path, 'norm', name] = leaf(f)
      for name in ('mean', 'var'):
        flat['batch_stats', *path, 'norm', name] = leaf(f)
  tree = traverse_util.unflatten_dict(flat)
  made = zoo.to_tensors(tree)
  back = zoo.from_tensors(tree, made, 'test')
  jax.tree.map(np.testing.assert_array_equal, back, tree)
  assert zoo.tensor_shapes(tree) == {name: tensor.shape for name, tensor in made.items()}


def test_foreign_names_are_made_canonical():
  """Torch's step counters, and the norm.1 of torchvision's old DenseNets."""
  given_names = [
    'bn1.num_batches_tracked',
    'conv1.weight',
    'features.denseblock1.denselayer12.norm.1.running_mean',
    'features.denseblock1.denselayer12.conv.2.weight',
    'features.transition1.norm.weight',
    'layer1.0.downsample.1.weight',
  ]
  assert [*zoo.canonical(dict.fromkeys(given_names, np.zeros(1)))] == [
    'conv1.weight',
    'features.denseblock1.denselayer12.norm1.running_mean',
    'features.denseblock1.denselayer12.conv2.weight',
    'features.transition1.norm.weight',
    'layer1.0.downsample.1.weight',
  ]


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', 'net.backbone.'])
def test_what_all_names_begin_with_comes_off_and_is_said(prefix):
  """Of DataParallel, torch.compile, Lightning, one about the other; a counter counts as a name."""
  names = ['conv1.weight', 'layer1.0.conv1.weight', 'bn1.num_batches_tracked']
  wrapped = {prefix + name: np.zeros(1) for name in names}
  with pytest.warns(UserWarning, match=f"w.npz: the prefix '{prefix}'"):
    assert [*zoo.canonical(wrapped, 'w.npz')] == names[:2]


@pytest.mark.parametrize('names', [['fc.weight', 'fc.bias'], ['net.a.b', 'nets.a.b'], ['a'], []])
def test_a_layer_s_own_name_stays(names):
  assert [*zoo.canonical(dict.fromkeys(names, np.zeros(1)))] == names


@pytest.mark.parametrize('dtype', ['int8', 'int64', 'bool', 'complex64', 'V2'])
def test_tensors_that_are_no_floats_are_refused(dtype):
  """V2 is how NumPy writes bfloat16; a quantised net's numbers are not its weights."""
  message = refusal(zoo.canonical, {'fc.weight': np.zeros(2, dtype)}, 'w.npz')
  assert message.startswith("w.npz: tensor 'fc.weight' is ")
  assert np.dtype(dtype).str.strip('<|') in message or dtype in message
  assert ('bfloat16 so' in message) == (dtype == 'V2')


def test_every_float_is_read():
  for dtype in ('float16', 'float64', '>f4', jnp.bfloat16):
    zoo.canonical({'fc.weight': np.zeros(2, dtype)})


# --- built-in weights and cards -------------------------------------------------------------------


def test_built_in_weights_are_loaded_with_their_card(builtin, variables):
  zoo.save_checkpoint(builtin / 'scene_resnet.safetensors', variables, CARD)
  assert (builtin / 'scene_resnet.safetensors').stat().st_size < 2e6
  classifier = load_classifier()
  jax.tree.map(np.testing.assert_array_equal, classifier.params, variables)
  x = np.random.RandomState(0).rand(2, 64, 64, 3).astype(np.float32)
  mean, std = (np.float32(CARD[field]).reshape(1, 1, 1, 3) for field in ('mean', 'std'))
  bare = load_classifier(mean=(0, 0, 0), std=(1, 1, 1))
  logits = jax.jit(lambda classifier, x: classifier(x).logits)
  np.testing.assert_allclose(
    logits(classifier, x), logits(bare, (x - mean) / std), rtol=1e-4, atol=1e-4
  )


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, variables):
  path = tmp_path / 'w.safetensors'
  zoo.save_checkpoint(path, variables, CARD)
  before = path.read_bytes()

  def full_disk(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(zoo.os, 'fsync', full_disk)
  with pytest.raises(OSError, match='No space left'):
    zoo.save_checkpoint(path, jax.tree.map(lambda x: 0 * x, variables), CARD)
  assert path.read_bytes() == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ['w.json', 'w.safetensors']


def test_built_in_refusals(builtin, variables):
  assert 'built in: none' in refusal(load_classifier)
  path = builtin / 'scene_resnet.safetensors'
  zoo.save_checkpoint(path, variables, CARD)
  assert 'built in: scene_resnet' in refusal(load_classifier, 'resnet18')
  card = path.with_suffix('.json')
  stored = json.loads(card.read_text())
  card.write_text(json.dumps(without(stored, 'std')))
  assert "lacks 'std'" in refusal(load_classifier)
  card.write_text('{')
  assert 'not a readable card' in refusal(load_classifier)
  card.unlink()
  assert 'not a readable card' in refusal(load_classifier)
  card.write_text(json.dumps({**stored, 'sha256': '0' * 64}))
  assert 'sha256' in refusal(load_classifier)


def test_save_checkpoint_refuses(tmp_path, variables):
  save = zoo.save_checkpoint
  path = tmp_path / 'w.safetensors'
  assert "lacks 'command'" in refusal(save, path, variables, without(CARD, 'command'))
  huge = jax.tree.map(lambda x: x * 1e7, variables)
  assert 'float16' in refusal(save, path, huge, CARD)
  assert not path.exists()


@pytest.mark.parametrize('name', zoo.built_in())
def test_shipped_weights_load_and_are_small(name):
  path = zoo.built_in()[name]
  decoder = name in zoo.BUILT_IN_DECODERS.values()
  assert path.stat().st_size < (3e6 if decoder else 2e6)
  model = zoo.read_card(path)['model']
  assert model == 'rts' if decoder else model in nets.ZOO
  load = zoo.load_decoder if decoder else functools.partial(load_classifier, model)
  assert jax.tree.all(jax.tree.map(lambda v: bool(jnp.isfinite(v).all()), load(name).params))


def test_a_card_s_mean_and_std_are_checked_too(tmp_path, tensors):
  np.savez(tmp_path / 'w.npz', **tensors)
  for field, bad in (('mean', [0.5, 0.5]), ('std', [58.4, 57.1, 57.4])):
    card = {**CARD, 'sha256': None, field: bad}
    (tmp_path / 'w.json').write_text(json.dumps(card))
    message = refusal(load_classifier, weights=tmp_path / 'w.npz')
    assert f'{field} of the card {tmp_path / "w.json"} is' in message


# --- tensors that are wrong -----------------------------------------------------------------------


def test_the_first_wrong_tensor_is_named(tensors, variables):
  some = 'layer2.0.conv1.weight'

  def message(changed):
    return refusal(zoo.from_tensors, variables, changed, 'w.npz')

  assert message(without(tensors, some)).startswith(
    f"w.npz: tensor '{some}' [32, 16, 3, 3] is missing"
  )
  two = without(without(tensors, some), 'layer3.1.bn1.bias')
  assert message(dict(reversed(two.items()))) == message(two)
  assert message({**tensors, 'extra.weight': np.ones(2)}).startswith(
    "w.npz: tensor 'extra.weight' [2] is unexpected"
  )
  assert message({**tensors, some: tensors[some][:, :8]}).startswith(
    f"w.npz: tensor '{some}' has shape [32, 8, 3, 3], expected [32, 16, 3, 3]"
  )
  for bad in (np.nan, np.inf):
    broken = tensors[some].copy()
    broken[1, 2, 0, 0] = bad
    assert message({**tensors, some: broken}) == (
      f"w.npz: tensor '{some}' holds NaN or infinite values; get the file again or retrain"
    )


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'cifar_resnet56'])
def test_another_architecture_is_recognised(name):
  empty = {key: np.zeros(s, np.float32) for key, s in zoo_shapes(name, num_classes=5).items()}
  message = refusal(load_variables, nets.build('scene_resnet'), empty)
  assert f'these are the weights of {name} with 5 classes' in message


def test_the_number_of_classes_is_the_head_s(tmp_path):
  made = numpy_weights(zoo_shapes('scene_resnet', num_classes=4), seed=1)
  np.savez(tmp_path / 'w.npz', **made)
  classifier = load_classifier('scene_resnet', tmp_path / 'w.npz')
  assert classifier.head(jnp.ones((1, 8, 8, 96))).shape == (1, 4)
  message = refusal(load_classifier, 'scene_resnet', tmp_path / 'w.npz', num_classes=10)
  assert "'fc.bias' has shape [4], expected [10]" in message
  assert 'scene_resnet with 4 classes' in message


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ({'name': 'vgg16'}, "unknown model 'vgg16'"),
    ({'mean': (0.5,)}, 'mean is (0.5,); expected three numbers'),
    ({'mean': (123.675, 116.28, 103.53)}, 'divide them by 255'),
    ({'mean': (-0.1, 0.5, 0.5)}, 'mean is'),
    ({'mean': 0.5}, 'mean is 0.5'),
    ({'std': (58.4, 57.1, 57.4)}, 'divide them by 255'),
    ({'std': (0.5, 0.5, float('nan'))}, 'std is'),
    ({'std': (0.5, 0.5, 0.0)}, 'std is'),
    ({'dtype': 'int8'}, 'dtype is int8'),
    ({'num_classes': 0}, 'num_classes is 0'),
  ],
)
def test_load_classifier_refuses(tmp_path, tensors, arguments, words):
  np.savez(tmp_path / 'w.npz', **tensors)
  assert words in refusal(load_classifier, weights=tmp_path / 'w.npz', **arguments)


# --- classifiers ----------------------------------------------------------------------------------


def test_loading_again_traces_nothing_anew(tmp_path, tensors):
  np.savez(tmp_path / 'w.npz', **tensors)
  traces = []

  @jax.jit
  def head(classifier, features):
    traces.append(None)
    return classifier.head(features)

  features = jnp.ones((1, 8, 8, 96))
  for _ in range(2):
    head(load_classifier(weights=tmp_path / 'w.npz'), features)
  assert len(traces) == 1
  head(load_classifier(weights=tmp_path / 'w.npz', mean=(0.5, 0.5, 0.5)), features)
  assert len(traces) == 2


@pytest.mark.parametrize('dtype', [None, 'float32', 'bfloat16', jnp.bfloat16])
def test_load_classifier_computes_in_the_dtype_asked_for(tmp_path, tensors, dtype):
  np.savez(tmp_path / 'w.npz', **tensors)
  classifier = load_classifier(weights=tmp_path / 'w.npz', dtype=dtype)
  out = jax.eval_shape(classifier, jnp.zeros((1, 64, 64, 3)))
  assert out.taps['features'].dtype == jnp.dtype(dtype or jnp.float32)
  assert out.logits.dtype == jnp.float32


def test_a_user_s_home_is_found(tmp_path, monkeypatch, tensors):
  monkeypatch.setenv('HOME', str(tmp_path))
  np.savez(tmp_path / 'w.npz', **tensors)
  assert zoo.resolve('~/w.npz') == tmp_path / 'w.npz'


# --- published weights ----------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
  ('name', 'right'),
  [('cifar_resnet20', 179), pytest.param('cifar_resnet56', 182, marks=pytest.mark.slow)],
)
def test_published_cifar_weights_classify(name, right):
  """As many right as the same nets get in torch on these 199 images."""
  data = np.load(shared_data('cifar10_lossless_199.npz'))
  classifier = load_classifier(name, shared_data(f'{name}.npz'))
  x = data['image'] / np.float32(255)
  logits = jax.jit(lambda classifier, x: classifier(x).logits)(classifier, x)
  assert abs(int((logits.argmax(-1) == data['label']).sum()) - right) <= 1


@pytest.mark.real
@pytest.mark.parametrize('name', ['resnet18', pytest.param('resnet50', marks=pytest.mark.slow)])
def test_published_imagenet_weights_classify(name):
  """Top-1 is 65 to 68 %: 16 photographs leave no doubt about a wrong layout or normalisation."""
  import io

  from PIL import Image

  packed = np.load(shared_data('imagenet_val_500.npz'))
  pieces = zip(packed['offsets'][:16], packed['offsets'][1:17], strict=True)
  images = [Image.open(io.BytesIO(packed['blob'][a:b].tobytes())) for a, b in pieces]
  x = np.stack([np.asarray(image.convert('RGB')) for image in images]) / np.float32(255)
  classifier = load_classifier(name, shared_data(f'{name}_imagenet.npz'))
  logits = jax.jit(lambda classifier, x: classifier(x).logits)(classifier, x)
  assert (logits.argmax(-1) == packed['y'][:16]).sum() >= 8
