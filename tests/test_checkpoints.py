"""Weights in every format, and every way in which a file of weights can be wrong."""

import functools
import hashlib
import http.server
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import PARITY, shared_data
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.weights import numpy_weights

from adv2_jax import checkpoints, nets, weight_files
from adv2_jax.checkpoints import load_classifier, load_variables, read_tensors
from adv2_jax.types import InputError
from experiments import convert

CARD = {
  'model': 'scene_resnet',
  'num_classes': 10,
  'mean': [0.5, 0.4, 0.3],
  'std': [0.2, 0.2, 0.2],
  'accuracy': 0.1,
  'command': 'none: random weights',
}


def zoo_shapes(name, **fields):
  module = nets.build(name, **fields)
  x = jnp.zeros((1, 32, 32, 3))
  return checkpoints.tensor_shapes(jax.eval_shape(module.init, jax.random.key(0), x))


@pytest.fixture(scope='module')
def tensors():
  """Weights of a scene_resnet that float16 holds exactly."""
  made = numpy_weights(zoo_shapes('scene_resnet'), seed=3)
  return {name: t.astype(np.float16).astype(np.float32) for name, t in made.items()}


@pytest.fixture(scope='module')
def variables(tensors):
  return load_variables(nets.build('scene_resnet'), tensors)


@pytest.fixture
def builtin(tmp_path, monkeypatch):
  """An installed package's folder of built-in weights, empty."""
  monkeypatch.setattr(checkpoints, '_PACKAGE', tmp_path / 'adv2_jax')
  folder = tmp_path / 'adv2_jax' / '_builtin'
  folder.mkdir(parents=True)
  return folder


def assert_same(actual, expected):
  assert actual.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def without(tensors, name):
  return {k: v for k, v in tensors.items() if k != name}


def refusal(call, *args, **kwargs):
  """The message of the InputError that the call must raise: always one line."""
  with pytest.raises(InputError) as caught:
    call(*args, **kwargs)
  assert '\n' not in str(caught.value)
  return str(caught.value)


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
  made = checkpoints.to_tensors(tree)
  back = checkpoints.from_tensors(tree, made, 'test')
  jax.tree.map(np.testing.assert_array_equal, back, tree)
  assert checkpoints.tensor_shapes(tree) == {name: tensor.shape for name, tensor in made.items()}


def test_foreign_names_are_made_canonical():
  """DataParallel's prefix, torch's step counters, and the norm.1 of torchvision's old DenseNets."""
  given_names = [
    'module.conv1.weight',
    'module.bn1.num_batches_tracked',
    'features.denseblock1.denselayer12.norm.1.running_mean',
    'features.denseblock1.denselayer12.conv.2.weight',
    'features.transition1.norm.weight',
    'layer1.0.downsample.1.weight',
  ]
  assert [*checkpoints.canonical(dict.fromkeys(given_names, np.zeros(1)))] == [
    'conv1.weight',
    'features.denseblock1.denselayer12.norm1.running_mean',
    'features.denseblock1.denselayer12.conv2.weight',
    'features.transition1.norm.weight',
    'layer1.0.downsample.1.weight',
  ]


# --- formats --------------------------------------------------------------------------------------


def write_npz(path, tensors, variables):
  np.savez(path, **tensors)


def write_safetensors(path, tensors, variables):
  weight_files.write_safetensors(path, tensors)


def write_orbax(path, tensors, variables):
  import orbax.checkpoint.experimental.v1 as ocp

  ocp.save(path, {**variables, 'step': 7, 'opt_state': optax.adam(0.1).init(variables)})


def write_older_orbax(path, tensors, variables):
  import orbax.checkpoint

  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, variables)


FORMATS = [
  ('w.npz', write_npz),
  ('w.safetensors', write_safetensors),
  ('v1', write_orbax),
  ('v0', write_older_orbax),
]


@pytest.mark.parametrize(('name', 'write'), FORMATS)
def test_formats_round_trip(tmp_path, tensors, variables, name, write):
  write(tmp_path / name, tensors, variables)
  assert_same(read_tensors(tmp_path / name), tensors)
  classifier = load_classifier('scene_resnet', tmp_path / name)
  jax.tree.map(np.testing.assert_array_equal, classifier.params, variables)


def test_half_precision_is_loaded_as_float32(tmp_path, tensors, variables):
  np.savez(tmp_path / 'w.npz', **{name: t.astype(np.float16) for name, t in tensors.items()})
  loaded = load_classifier('scene_resnet', str(tmp_path / 'w.npz')).params
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A stand-in for the hub on 127.0.0.1, serving `folder` as the files of owner/name."""
  folder = tmp_path / 'served'
  folder.mkdir()

  class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
      pass

    def do_GET(self):
      prefix, file = '/owner/name/resolve/main/', None
      if self.path.startswith(prefix):
        file = folder / self.path.removeprefix(prefix)
      if file is None or not file.is_file():
        self.send_response(404)
        self.send_header('X-Error-Code', 'EntryNotFound' if file else 'RepoNotFound')
        self.send_header('Content-Length', '0')
        self.end_headers()
        return
      content = file.read_bytes()
      self.send_response(200)
      self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
      self.send_header('X-Repo-Commit', 'c' * 40)
      self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      if self.command == 'GET':
        self.wfile.write(content)

    do_HEAD = do_GET

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  url = f'http://127.0.0.1:{server.server_port}'
  constants = huggingface_hub.constants
  monkeypatch.setattr(constants, 'ENDPOINT', url)
  template = url + '/{repo_id}/resolve/{revision}/{filename}'
  monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
  yield folder
  server.shutdown()
  server.server_close()
  thread.join()


def test_weights_come_from_the_hub(hub, tensors):
  weight_files.write_safetensors(hub / 'model.safetensors', tensors)
  (hub / 'sub').mkdir()
  np.savez(hub / 'sub' / 'w.npz', a=np.ones(2))
  assert_same(read_tensors('hf://owner/name'), tensors)
  assert_same(read_tensors('hf://owner/name/sub/w.npz'), {'a': np.ones(2)})


def test_a_damaged_download_is_found_by_its_sha256(hub, tensors):
  weight_files.write_safetensors(hub / 'model.safetensors', tensors)
  cached = checkpoints.resolve('hf://owner/name').resolve()
  content = bytearray(cached.read_bytes())
  content[-1] ^= 1
  cached.chmod(0o644)
  cached.write_bytes(content)
  assert 'sha256' in refusal(read_tensors, 'hf://owner/name')


@pytest.mark.parametrize(
  ('source', 'words'),
  [
    ('hf://owner/name', "no file 'model.safetensors'"),
    ('hf://owner/name/other.npz', "no file 'other.npz'"),
    ('hf://owner/absent', 'cannot get hf://owner/absent'),
    ('hf://owner', 'expected hf://owner/name'),
    ('hf://owner/name/w.bin', 'python -m experiments.convert w.bin w.safetensors'),
  ],
)
def test_hub_refusals(hub, source, words):
  assert words in refusal(read_tensors, source)


# --- built-in weights and cards -------------------------------------------------------------------


def test_built_in_weights_are_loaded_with_their_card(builtin, variables):
  checkpoints.save_checkpoint(builtin / 'scene_resnet.safetensors', variables, CARD)
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
  checkpoints.save_checkpoint(path, variables, CARD)
  before = path.read_bytes()

  def full_disk(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoints.os, 'fsync', full_disk)
  with pytest.raises(OSError, match='No space left'):
    checkpoints.save_checkpoint(path, jax.tree.map(lambda x: 0 * x, variables), CARD)
  assert path.read_bytes() == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ['w.json', 'w.safetensors']


def test_built_in_refusals(builtin, variables):
  assert 'built in: none' in refusal(load_classifier)
  path = builtin / 'scene_resnet.safetensors'
  checkpoints.save_checkpoint(path, variables, CARD)
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
  save = checkpoints.save_checkpoint
  path = tmp_path / 'w.safetensors'
  assert "lacks 'command'" in refusal(save, path, variables, without(CARD, 'command'))
  huge = jax.tree.map(lambda x: x * 1e7, variables)
  assert 'float16' in refusal(save, path, huge, CARD)
  assert not path.exists()


@pytest.mark.parametrize('name', checkpoints.built_in())
def test_shipped_weights_load_and_are_small(name):
  path = checkpoints.built_in()[name]
  decoder = name in checkpoints.BUILT_IN_DECODERS.values()
  assert path.stat().st_size < (3e6 if decoder else 2e6)
  model = checkpoints.read_card(path)['model']
  assert model == 'rts' if decoder else model in nets.ZOO
  load = checkpoints.load_decoder if decoder else functools.partial(load_classifier, model)
  assert jax.tree.all(jax.tree.map(lambda v: bool(jnp.isfinite(v).all()), load(name).params))


# --- files that are wrong -------------------------------------------------------------------------


def test_the_first_wrong_tensor_is_named(tensors, variables):
  some = 'layer2.0.conv1.weight'

  def message(changed):
    return refusal(checkpoints.from_tensors, variables, changed, 'w.npz')

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


@pytest.mark.parametrize('share', [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize(('name', 'write'), FORMATS[:2])
def test_part_of_a_file_is_refused(tmp_path, tensors, name, write, share):
  path = tmp_path / name
  write(path, tensors, None)
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])
  message = refusal(read_tensors, path)
  assert ('empty' if share == 0 else 'only part of one') in message
  assert str(path) in message


@pytest.mark.parametrize('suffix', ['.npz', '.safetensors'])
@given(content=st.binary(min_size=1, max_size=80))
@settings(max_examples=40, deadline=None)
def test_arbitrary_bytes_are_refused(suffix, content):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / f'w{suffix}'
    path.write_bytes(content)
    refusal(read_tensors, path)


def test_damaged_orbax_directories_are_refused(tmp_path):
  import orbax.checkpoint.experimental.v1 as ocp

  (tmp_path / 'not_orbax').mkdir()
  assert 'not an orbax checkpoint' in refusal(read_tensors, tmp_path / 'not_orbax')
  # One tensor and no more: orbax closes its event loop at the first tensor it cannot read, and the
  # reads still under way would then complain from their own threads.
  ocp.save(tmp_path / 'w', {'params': {'weights': np.ones(2, np.float32)}})
  data = [*tmp_path.glob('w/*/d')]
  assert data
  for folder in data:
    shutil.rmtree(folder)
  assert 'not an orbax checkpoint' in refusal(read_tensors, tmp_path / 'w')
  ocp.save(tmp_path / 'other', {'weights': np.ones(2, np.float32)})
  assert 'no "params"' in refusal(read_tensors, tmp_path / 'other')


def test_sources_that_are_nothing_are_refused(tmp_path, builtin):
  assert 'no weights at' in refusal(read_tensors, tmp_path / 'absent.npz')
  assert 'expected a built-in name' in refusal(read_tensors, 'absent')
  (tmp_path / 'w.onnx').write_bytes(b'x')
  assert "unknown weights format '.onnx'" in refusal(read_tensors, tmp_path / 'w.onnx')


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ({'name': 'vgg16'}, "unknown model 'vgg16'"),
    ({'mean': (0.5,)}, 'mean is (0.5,)'),
    ({'std': (0.5, 0.5, float('nan'))}, 'std is'),
    ({'std': (0.5, 0.5, 0.0)}, 'std is'),
    ({'dtype': 'int8'}, 'dtype is int8'),
    ({'num_classes': 0}, 'num_classes is 0'),
  ],
)
def test_load_classifier_refuses(tmp_path, tensors, arguments, words):
  np.savez(tmp_path / 'w.npz', **tensors)
  assert words in refusal(load_classifier, weights=tmp_path / 'w.npz', **arguments)


class Bomb:
  """Unpickled, it would write a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (str(self.path), 'w'))


@pytest.mark.parametrize('name', ['w.pth', 'w.pt', 'w.pkl', 'w.npz', 'w.safetensors', 'object.npz'])
def test_pickles_are_refused_unopened(tmp_path, name):
  path = tmp_path / name
  if name == 'object.npz':
    np.savez(path, a=np.array([Bomb(tmp_path / 'harm')], dtype=object))
    assert 'plain arrays' in refusal(read_tensors, path)
  else:
    path.write_bytes(pickle.dumps(Bomb(tmp_path / 'harm')))
    command = f'python -m experiments.convert {path} {path.with_suffix(".safetensors")}'
    assert refusal(read_tensors, path).endswith(command)
  assert not (tmp_path / 'harm').exists()


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


# --- experiments.convert --------------------------------------------------------------------------


@pytest.mark.parametrize('wrap', ['bare', 'state_dict', 'model'])
def test_convert_turns_torch_s_file_into_safetensors(tmp_path, capsys, tensors, wrap):
  torch = pytest.importorskip('torch', reason='torch is in the convert extra')
  content = {f'module.{name}': torch.from_numpy(t) for name, t in tensors.items()}
  content['module.bn1.num_batches_tracked'] = torch.tensor(5)
  if wrap != 'bare':
    content = {wrap: content, 'epoch': 3, 'optimizer': {'lr': 0.1}}
  torch.save(content, tmp_path / 'w.pth')
  convert.main([str(tmp_path / 'w.pth'), str(tmp_path / 'w.safetensors')])
  assert '--model scene_resnet' in capsys.readouterr().out
  assert_same(read_tensors(tmp_path / 'w.safetensors'), tensors)
  shutil.copy(tmp_path / 'w.pth', tmp_path / 'renamed.npz')
  assert 'experiments.convert' in refusal(read_tensors, tmp_path / 'renamed.npz')


def test_convert_refuses(tmp_path, monkeypatch):
  torch = pytest.importorskip('torch', reason='torch is in the convert extra')
  good, out = tmp_path / 'good.pth', tmp_path / 'out.safetensors'
  torch.save({'a': torch.ones(2)}, good)
  (tmp_path / 'bomb.pth').write_bytes(pickle.dumps(Bomb(tmp_path / 'harm')))
  torch.save([1, 2], tmp_path / 'list.pth')
  torch.save({'lr': 0.1}, tmp_path / 'none.pth')
  (tmp_path / 'there.safetensors').write_bytes(b'mine')
  for source, target, words in [
    (tmp_path / 'absent.pth', out, 'no file at'),
    (good, tmp_path / 'out.npz', 'must end in .safetensors'),
    (good, tmp_path / 'there.safetensors', 'exists already'),
    (good, tmp_path / 'nowhere' / 'out.safetensors', 'not a directory'),
    (tmp_path / 'bomb.pth', out, 'not a checkpoint of tensors alone'),
    (tmp_path / 'list.pth', out, 'expected a state dict'),
    (tmp_path / 'none.pth', out, 'holds no tensors'),
  ]:
    assert words in refusal(convert.convert, source, target)
  monkeypatch.setitem(sys.modules, 'torch', None)
  assert 'pip install "adv2_jax[convert]"' in refusal(convert.convert, good, out)
  assert not out.exists()
  assert not (tmp_path / 'harm').exists()
  assert (tmp_path / 'there.safetensors').read_bytes() == b'mine'


def test_convert_s_exit_codes(tmp_path):
  command = [sys.executable, '-m', 'experiments.convert']
  tree = pathlib.Path(convert.__file__).parent.parent

  def run(*args):
    return subprocess.run([*command, *args], cwd=tree, capture_output=True, text=True, check=False)

  assert run('--help').returncode == 0
  failed = run(str(tmp_path / 'absent.pth'), str(tmp_path / 'out.safetensors'))
  assert failed.returncode != 0
  assert failed.stderr.splitlines()[-1].startswith('error: no file at')


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
