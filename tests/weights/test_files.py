"""Weights in every format, and every way in which a file of weights can be wrong."""

import hashlib
import http.server
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import threading

import huggingface_hub.constants
import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_help import assert_same, refusal

from adv2_jax.weights import files as weight_files
from adv2_jax.weights import zoo
from adv2_jax.weights.zoo import load_classifier, read_tensors
from experiments import convert

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
  cached = zoo.resolve('hf://owner/name').resolve()
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


def test_of_a_manager_s_root_the_newest_step_is_read(tmp_path, tensors, variables):
  for step in ('9', '10', '11.orbax-checkpoint-tmp'):
    write_orbax(tmp_path / 'run' / step, None, jax.tree.map(lambda v: v * int(step[:2]), variables))
  with pytest.warns(UserWarning, match='run holds 2 steps; 10 is read'):
    read = read_tensors(tmp_path / 'run')
  np.testing.assert_array_equal(read['fc.bias'], 10 * tensors['fc.bias'])


# --- files that are wrong -------------------------------------------------------------------------


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


def test_an_eight_bit_float_is_refused_by_name(tmp_path):
  """NumPy has no such dtype: the reader itself would end with an AttributeError."""
  header = b'{"fc.weight":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
  (tmp_path / 'w.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + b'..')
  assert "tensor 'fc.weight' is F8_E4M3" in refusal(read_tensors, tmp_path / 'w.safetensors')


def test_damaged_orbax_directories_are_refused(tmp_path):
  import orbax.checkpoint.experimental.v1 as ocp

  (tmp_path / 'not_orbax').mkdir()
  assert 'directory is empty' in refusal(read_tensors, tmp_path / 'not_orbax')
  (tmp_path / 'not_orbax' / 'file').touch()
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


# --- experiments.convert --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*the prefix 'module.'")
@pytest.mark.parametrize('wrap', ['bare', 'state_dict', 'model'])
def test_convert_turns_torch_s_file_into_safetensors(tmp_path, capsys, tensors, wrap):
  torch = pytest.importorskip('torch', reason='torch is in the convert extra')
  content = {f'module.{name}': torch.from_numpy(t) for name, t in tensors.items()}
  content['module.bn1.num_batches_tracked'] = torch.tensor(5)
  if wrap != 'bare':
    content = {'net': {wrap: content}, 'epoch': 3, 'optimizer': {'lr': 0.1}}
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
  torch.save({'fc.weight': torch.ones(2, dtype=torch.int8)}, tmp_path / 'int8.pth')
  (tmp_path / 'there.safetensors').write_bytes(b'mine')
  for source, target, words in [
    (tmp_path / 'absent.pth', out, 'no file at'),
    (good, tmp_path / 'out.npz', 'must end in .safetensors'),
    (good, tmp_path / 'there.safetensors', 'exists already'),
    (good, tmp_path / 'nowhere' / 'out.safetensors', 'not a directory'),
    (tmp_path / 'bomb.pth', out, 'not a checkpoint of tensors alone'),
    (tmp_path / 'list.pth', out, 'expected a state dict'),
    (tmp_path / 'none.pth', out, 'holds no tensors'),
    (tmp_path / 'int8.pth', out, "tensor 'fc.weight' is torch.int8"),
  ]:
    assert words in refusal(convert.convert, source, target)
  monkeypatch.setitem(sys.modules, 'torch', None)
  assert 'pip install ".[convert]"' in refusal(convert.convert, good, out)
  assert not out.exists()
  assert not (tmp_path / 'harm').exists()
  assert (tmp_path / 'there.safetensors').read_bytes() == b'mine'


def test_convert_finds_a_user_s_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert f'no file at {tmp_path}/in.pth' in refusal(convert.convert, '~/in.pth', '~/o.safetensors')
  (tmp_path / 'o.safetensors').touch()
  assert 'exists already' in refusal(convert.convert, '~/in.pth', '~/o.safetensors')


def test_convert_unwraps_what_scripts_put_around():
  inner = {'fc.weight': 1}
  for content in (inner, {'state_dict': inner}, {'net': {'model': inner}, 'params': 3}):
    assert convert._state_dict(content, pathlib.Path('w.pth')) is inner


def test_convert_s_exit_codes(tmp_path):
  command = [sys.executable, '-m', 'experiments.convert']
  tree = pathlib.Path(convert.__file__).parent.parent

  def run(*args):
    return subprocess.run([*command, *args], cwd=tree, capture_output=True, text=True, check=False)

  assert run('--help').returncode == 0
  failed = run(str(tmp_path / 'absent.pth'), str(tmp_path / 'out.safetensors'))
  assert failed.returncode != 0
  assert failed.stderr.splitlines()[-1].startswith('error: no file at')
