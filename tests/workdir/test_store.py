"""The result store: whole shards or nothing, resuming, refusals, full disks."""

import csv
import errno
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adv2_jax import types
from adv2_jax.workdir import results, store

CONFIG = {'dataset': 'scenes', 'epsilon': 0.031, 'interpreters': ('cam', 'grad'), 'num_devices': 1}


def made(ids, attack='adv2'):
  """Records and arrays that depend on the id alone, as an attack's do."""
  draws = [np.random.RandomState(i) for i in ids]
  records = [
    {
      'id': i,
      'label': i % 10,
      'target': (i + 1) % 10,
      'prediction': (i + i % 2) % 10,
      'confidence': float(f'{draw.rand():.7g}'),
      'success': bool(i % 2),
      'map_l1': None if i == 3 else 0.25,
      'map_iou': 0.5,
    }
    for i, draw in zip(ids, draws, strict=True)
  ]
  pictures = np.stack([draw.randint(0, 256, (8, 9, 3)).astype(np.uint8) for draw in draws])
  maps = np.stack([draw.rand(4, 4).astype(np.float32) for draw in draws])
  return records, {f'examples/{attack}/cam': pictures, f'maps/{attack}/cam': maps}


def write(workdir, ids, attack='adv2', **extras):
  records, arrays = made(ids, attack)
  workdir.write_shard(attack, 'cam', records, arrays, **extras)


def tree(path):
  """Every file and its bytes, hidden ones too."""
  return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob('*') if p.is_file()}


def test_files_hold_what_was_written(tmp_path):
  workdir = store.Workdir.create(tmp_path / 'run', CONFIG)
  write(workdir, [2, 3, 11])
  records, arrays = made([2, 3, 11])
  for i, image, m in zip([2, 3, 11], *arrays.values(), strict=True):
    with PIL.Image.open(workdir.path / f'examples/adv2/cam/{i:06d}.png') as file:
      np.testing.assert_array_equal(np.asarray(file), image)
    stored = np.load(workdir.path / f'maps/adv2/cam/{i:06d}.npy', allow_pickle=False)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, m)
  assert workdir.records('adv2', 'cam') == records
  assert workdir.done('adv2', 'cam') == {2, 3, 11}
  assert workdir.done('adv2', 'grad') == workdir.done('pgd', 'cam') == set()
  assert not [name for name in tree(workdir.path) if '/.' in name]


def test_finish_writes_table_and_metrics(tmp_path):
  workdir = store.Workdir.create(tmp_path, CONFIG)
  write(workdir, [10, 3])
  write(workdir, [3], 'pgd')
  rows = [{'attack': 'adv2', 'asr': np.float32(0.1), 'map_l1': float('nan'), 'n': np.int64(2)}]
  workdir.finish(rows, {'devices': ['cpu']})
  with open(tmp_path / 'examples.csv', newline='') as file:
    table = list(csv.DictReader(file))
  assert tuple(table[0]) == store.CSV_FIELDS
  keys = [(r['id'], r['attack'], r['interpreter']) for r in table]
  assert keys == [('3', 'pgd', 'cam'), ('3', 'adv2', 'cam'), ('10', 'adv2', 'cam')]
  assert (table[1]['map_l1'], table[1]['success'], table[2]['success']) == ('', '1', '0')
  result = json.loads((tmp_path / 'metrics.json').read_text())
  assert result['rows'] == [{'attack': 'adv2', 'asr': 0.1, 'map_l1': None, 'n': 2}]
  assert result['config'] == {**CONFIG, 'interpreters': ['cam', 'grad']}


def history(tmp_path, *shards):
  """The curves of shards with one to three examples each."""
  workdir = store.Workdir.create(tmp_path, CONFIG)
  ids = iter(range(99))
  for curves in shards:
    write(
      workdir,
      [next(ids) for _ in next(v for k, v in curves.items() if k != 'step')[0]],
      curves=curves,
    )
  workdir.finish([], {})
  return json.loads((tmp_path / 'history.json').read_text())['curves']['adv2/cam']


def test_history_pools_shards_by_example(tmp_path):
  """Means are over examples, not over shards, and a shard that stopped early stays as it was."""
  curve = history(
    tmp_path,
    {'step': [0, 10, 20], 'total': [[1, 2], [1, 1], [0, 0]]},
    {'step': [0, 10], 'total': [[6], [4]]},
  )
  assert curve == {'step': [0, 10, 20], 'total': [3, 2, float(f'{4 / 3:.6g}')]}


def test_history_meets_by_step_not_by_place(tmp_path):
  """None is no value, and neither is there one before a shard's first step."""
  curve = history(
    tmp_path,
    {'step': [10, 20, 30], 'total': [[1], [3], [5]], 'map': [[None], [4], [None]]},
    {'step': [15, 30], 'total': [[7], [9]], 'map': [[2], [2]]},
  )
  assert curve == {
    'step': [10, 15, 20, 30],
    'total': [1, 4, 5, 7],
    'map': [None, 2, 3, 2],
  }


def test_each_shard_is_read_once_by_its_name(tmp_path, monkeypatch):
  """Whatever there is besides: reading all for each kind would take time with the square."""
  workdir = store.Workdir.create(tmp_path, CONFIG)
  for i in range(0, 12, 3):
    for attack in ('benign', 'pgd', 'adv2'):
      write(workdir, range(i, i + 3), attack)
  read, real = [], store.read_json
  monkeypatch.setattr(store, 'read_json', lambda path, _: read.append(path.name) or real(path, _))
  assert workdir.done('pgd', 'cam') == set(range(12))
  assert read == [f'pgd-cam-{i:06d}.json' for i in range(0, 12, 3)]
  shards = workdir.shards('pgd', 'cam')
  next(shards)
  assert len(read) == 5  # one at a time, not all
  read.clear()
  workdir.finish([], {})
  assert len(read) == len(set(read)) == 12


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(6)), st.lists(st.integers(1, 5), max_size=5))
def test_bytes_do_not_depend_on_the_cut_into_shards(tmp_path_factory, ids, cuts):
  def run(shards):
    path = tmp_path_factory.mktemp('run')
    workdir = store.Workdir.create(path, CONFIG)
    for shard in shards:
      if shard:
        write(workdir, shard)
    workdir.finish([], {})
    return {name: b for name, b in tree(path).items() if not name.startswith('shards/')}

  edges = [0, *sorted(set(cuts)), 6]
  cut = run([list(ids[a:b]) for a, b in itertools.pairwise(edges)])
  assert cut == run([range(6)])


# Refusals.


def refuses(match, path, config=CONFIG, resume=False):
  before = tree(path) if path.is_dir() else None
  with pytest.raises(store.StoreError, match=match) as info:
    store.Workdir.create(path, config, resume)
  assert '\n' not in str(info.value)
  if before is not None:
    assert tree(path) == before


def test_a_directory_in_use_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('mine')
  refuses('not empty; go on with that run by --resume', tmp_path)
  refuses('holds no run that could be resumed', tmp_path, resume=True)
  refuses('is a file; choose a directory', tmp_path / 'thesis.tex')
  refuses(r'cannot write .*thesis.tex.*Not a directory', tmp_path / 'thesis.tex' / 'run')


def test_resume_compares_the_flags_that_change_results(tmp_path):
  write(store.Workdir.create(tmp_path, CONFIG, resume=True), [1])  # on an empty one: just starts
  refuses('not empty', tmp_path)
  other = {**CONFIG, 'epsilon': 0.05}
  refuses('--epsilon 0.031, now it is 0.05', tmp_path, other, resume=True)
  refuses("--dataset 'scenes', now it is None", tmp_path, {}, resume=True)
  # The last bit of a convolution's sums may depend on it.
  refuses(
    'by another version, which knew no --batch_size',
    tmp_path,
    {**CONFIG, 'batch_size': 8},
    resume=True,
  )
  moved = {**CONFIG, 'num_devices': 8, 'workdir': 'elsewhere', 'resume': True}
  assert store.Workdir.create(tmp_path, moved, resume=True).done('adv2', 'cam') == {1}


def test_resume_compares_the_content_of_what_it_reads(tmp_path):
  config = {**CONFIG, 'weights': 'net.npz', 'masks': 'masks.npz', 'data_path': 'folder'}
  old = {'weights': '1', 'masks': '2', 'data': '3'}
  store.Workdir.create(tmp_path, config, digests=old)
  for changed, message in (
    ({'weights': '4'}, r'^weights net\.npz changed since the run in .* was made: put it back'),
    ({'data': '4'}, '^data folder changed since'),
    ({'data': '4', 'masks': '5'}, r'^masks masks\.npz changed'),  # the data's digest has the masks
  ):
    before = tree(tmp_path)
    with pytest.raises(store.StoreError, match=message):
      store.check_digests(tmp_path, config, old | changed)
    with pytest.raises(store.StoreError, match=message):
      store.Workdir.create(tmp_path, config, True, old | changed)
    assert tree(tmp_path) == before
  assert store.Workdir.create(tmp_path, config, True, old).config == store.plain(config)
  assert store.read_digests(tmp_path) == old


def test_a_run_without_digests_goes_on_and_has_them_from_then_on(tmp_path):
  write(store.Workdir.create(tmp_path, CONFIG), [1])
  assert store.read_digests(tmp_path) == {} == store.read_digests(tmp_path / 'nowhere')
  assert store.Workdir.create(tmp_path, CONFIG, True, {'data': '1'}).done('adv2', 'cam') == {1}
  assert store.read_digests(tmp_path) == {'data': '1'}


def test_a_home_directory_is_found(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert store.Workdir.create('~/run', CONFIG).path == tmp_path / 'run'
  with pytest.raises(store.StoreError, match='is not empty'):
    store.check_workdir('~/run', CONFIG, False)
  with pytest.raises(store.StoreError, match=r'has no metrics\.json'):
    results.read_results('~/run')
  assert not (tmp_path / '~').exists()


def test_text_that_is_not_utf_8_is_written(tmp_path):
  """A class folder or file named in Latin-1: half a surrogate pair, which UTF-8 does not have."""
  workdir = store.Workdir.create(tmp_path, {**CONFIG, 'data_path': '/caf\udce9'})
  records, _ = made([3])
  workdir.write_shard('adv2', 'cam', [{**records[0], 'file': 'caf\udce9/a\n.png'}], {})
  workdir.finish([], {}, ['caf\udce9\n'] * 10)
  told = results.read_results(tmp_path)
  assert told.config['data_path'] == '/caf\udce9'  # to be found again
  assert set(told.class_names.values()) == {'caf\ufffd\ufffd'}
  assert 'caf\ufffd/a\ufffd.png' in (tmp_path / 'examples.csv').read_text()


def test_damage_is_told(tmp_path):
  workdir = store.Workdir.create(tmp_path, CONFIG)
  write(workdir, [1])
  (tmp_path / 'shards' / 'adv2-cam-000001.json').write_text('{"records": [')
  with pytest.raises(store.StoreError, match=r'adv2-cam-000001\.json is damaged'):
    workdir.done('adv2', 'cam')


def test_arrays_must_match_records(tmp_path):
  workdir = store.Workdir.create(tmp_path, CONFIG)
  with pytest.raises(ValueError, match='2 arrays for 1 records'):
    workdir.write_shard('adv2', 'cam', [{'id': 0}], {'maps/adv2/cam': np.zeros((2, 4, 4))})


# Full disks and killed runs.


@pytest.mark.parametrize('writes', range(8))
def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, writes):
  """The disk fills up after any number of written files."""
  workdir = store.Workdir.create(tmp_path, CONFIG)
  write(workdir, [1, 2])
  before = tree(tmp_path)
  left, real = writes, os.fsync

  def fsync(descriptor):
    nonlocal left
    left -= 1
    if left < 0:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(descriptor)

  monkeypatch.setattr(os, 'fsync', fsync)
  with pytest.raises(store.StoreError, match=r'No space left on device; make room.*--resume'):
    write(workdir, [5, 6])
  monkeypatch.undo()
  assert tree(tmp_path) == before
  write(workdir, [5, 6])
  assert workdir.done('adv2', 'cam') == {1, 2, 5, 6}


@pytest.mark.parametrize('name', ['metrics.json', 'examples.csv'])
def test_full_disk_keeps_the_old_summary(tmp_path, monkeypatch, name):
  workdir = store.Workdir.create(tmp_path, CONFIG)
  write(workdir, [1])
  workdir.finish([{'n': 1}], {})
  before = tree(tmp_path)
  real = os.replace

  def replace(source, target):
    if pathlib.Path(target).name == name:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(source, target)

  monkeypatch.setattr(os, 'replace', replace)
  with pytest.raises(store.StoreError, match='No space left'):
    workdir.finish([{'n': 2}], {})
  monkeypatch.undo()
  assert tree(tmp_path) == before


def test_read_only_directory_is_refused_before_work(tmp_path, monkeypatch):
  real = os.replace

  def replace(source, target):
    if pathlib.Path(target).parent == tmp_path:
      raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
    real(source, target)

  monkeypatch.setattr(os, 'replace', replace)
  refuses(r'cannot write .*config\.json: Read-only file system', tmp_path)


def test_a_directory_that_cannot_be_written_is_found_without_making_it(tmp_path, monkeypatch):
  store.check_workdir(tmp_path / 'a' / 'run', CONFIG, False)

  def read_only(dir):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

  monkeypatch.setattr(store.tempfile, 'TemporaryFile', read_only)
  with pytest.raises(store.StoreError, match=r'cannot write .*: Read-only file system'):
    store.check_workdir(tmp_path / 'a' / 'run', CONFIG, False)
  assert not list(tmp_path.iterdir())


def test_something_in_the_way_is_told(tmp_path):
  workdir = store.Workdir.create(tmp_path, CONFIG)
  (tmp_path / 'maps').write_text('not a directory')
  with pytest.raises(store.StoreError, match=f'cannot write {re.escape(str(tmp_path))}/maps'):
    write(workdir, [1])
  assert workdir.done('adv2', 'cam') == set()


KILLED = """
  import os, signal, sys
  sys.path.insert(0, {tests!r})
  from adv2_jax.workdir import store
  import test_store

  def killed_after(renames, path):
    workdir = store.Workdir.create(path, test_store.CONFIG)
    test_store.write(workdir, [1, 2])
    real = os.replace

    def replace(source, target):
      nonlocal renames
      renames -= 1
      if renames < 0:
        os.kill(os.getpid(), signal.SIGKILL)
      real(source, target)

    os.replace = replace
    test_store.write(workdir, [5, 6])
    os._exit(0)

  for renames, path in enumerate({paths!r}):
    child = os.fork()
    if child == 0:
      killed_after(renames, path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_killed_at_every_rename(tmp_path):
  """Renames of the second shard: record into the staging, four arrays, record to its place."""
  whole = store.Workdir.create(tmp_path / 'whole', CONFIG)
  write(whole, [1, 2])
  write(whole, [5, 6])
  paths = [str(tmp_path / f'killed{i}') for i in range(6)]
  code = textwrap.dedent(KILLED).format(tests=str(pathlib.Path(__file__).parent), paths=paths)
  subprocess.run([sys.executable, '-c', code], check=True)
  for renames, path in enumerate(map(pathlib.Path, paths)):
    assert store.Workdir(path, CONFIG).done('adv2', 'cam') == {1, 2}
    workdir = store.Workdir.create(path, CONFIG, resume=True)
    assert workdir.done('adv2', 'cam') == ({1, 2} if renames == 0 else {1, 2, 5, 6})
    write(workdir, [5, 6])
    assert tree(path) == tree(whole.path)


# Values.


def test_records_leave_out_padding_and_write_none():
  scores = {
    'success': jnp.array([True, False, True]),
    'map_l1': jnp.array([0.1, np.nan, 0.3], jnp.float32),
    'prediction': jnp.array([3, 4, 5]),
  }
  rows = store.as_records(scores, is_real=[True, True, False], id=np.array([7, 9, 0]))
  assert rows == [
    {'id': 7, 'success': True, 'map_l1': 0.1, 'prediction': 3},
    {'id': 9, 'success': False, 'map_l1': None, 'prediction': 4},
  ]
  assert [type(v) for v in rows[0].values()] == [int, bool, float, int]
  with pytest.raises(types.InputError, match=r'column success has shape \(3,\).*\(2,\)'):
    store.as_records(scores, label=np.zeros(2))


def test_plain_keeps_the_shortest_decimal():
  assert store.plain({'a': np.float32(0.1), 'b': (np.inf, -1), 'c': jnp.array([[1.5]])}) == {
    'a': 0.1,
    'b': [None, -1],
    'c': [[1.5]],
  }
  assert store.plain([jnp.float32(0.25), pathlib.Path('runs/x'), True]) == [0.25, 'runs/x', True]


def test_default_workdir_names_the_config():
  name = store.default_workdir(CONFIG)
  assert re.fullmatch(r'runs/\d{8}-\d{6}-[0-9a-f]{8}', str(name))
  same = {**CONFIG, 'num_devices': 4, 'workdir': 'x'}
  assert store.config_hash(same) == store.config_hash(CONFIG)
  assert store.config_hash({**CONFIG, 'epsilon': 0.05}) != store.config_hash(CONFIG)
