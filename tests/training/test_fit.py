import errno
import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import flag_defaults

from adv2_jax.training import classifier as classifying
from adv2_jax.training import fit as training
from adv2_jax.types import InputError, Outputs
from adv2_jax.weights import zoo
from experiments import _flags, train

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


class Tiny(nn.Module):
  """Convolution, batch norm, pooling, dense: everything a training state has, small."""

  features: int = 4
  num_classes: int = 3

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(self.features, (3, 3))(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    return Outputs(nn.Dense(self.num_classes)(x.mean((1, 2))), {'features': x})


class Linear(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    self.variable('batch_stats', 'unused', lambda: jnp.zeros(()))
    return Outputs(nn.Dense(3)(x.reshape(len(x), -1)), {})


def colours(n: int, size: int = 8):
  """Pictures whose class is their strongest channel, and their labels."""
  rng = np.random.default_rng(0)
  labels = (np.arange(n) % 3).astype(np.int32)
  image = rng.integers(0, 160, (n, size, size, 3), np.uint8)
  image[np.arange(n), :, :, labels] += np.uint8(60)
  return image, labels


def make_run(steps, module=None, rate=0.1, **options):
  image, labels = colours(60)
  module = module or Tiny()
  tx = training.optimiser('sgd', rate, steps)
  state = classifying.init_state(module, tx, image.shape[1:], jax.random.key(1))
  step = classifying.classifier_step(module, tx, mean=MEAN, std=STD, **options)
  return step, state, training.shuffled(image, labels, 16, seed=5)


def test_training_learns_and_reports():
  rows = []
  step, state, batch_at = make_run(60, augment=training.pad_crop_flip)
  evaluate = classifying.make_evaluate(Tiny(), *colours(50), mean=MEAN, std=STD, batch_size=16)
  before = evaluate(state.variables)
  state = training.fit(
    step, state, batch_at, 60, jax.random.key(2), evaluate_every=30,
    evaluate=lambda state: {'accuracy': evaluate(state.variables)},
    log=rows.append, log_every=20, progress=False,
  )  # fmt: skip
  assert int(state.step) == 60
  assert evaluate(state.variables) > 0.95 > 0.6 > before
  losses = [row['loss'] for row in rows if 'loss' in row]
  assert losses[-1] < 0.5 * losses[0]
  assert [row['step'] for row in rows if 'held_out_accuracy' in row] == [30, 60]
  assert rows[-1]['held_out_accuracy'] == evaluate(state.variables)


def test_a_killed_and_resumed_run_is_bit_equal(tmp_path):
  options = {'augment': training.mirror_and_relight, 'label_smoothing': 0.1}
  key, path = jax.random.key(2), tmp_path / 'state.msgpack'
  step, state, batch_at = make_run(14, **options)
  straight = training.fit(step, state, batch_at, 14, key, progress=False)

  def killed_at_11(i):
    if i == 11:
      raise KeyboardInterrupt
    return batch_at(i)

  with pytest.raises(KeyboardInterrupt):
    training.fit(step, state, killed_at_11, 14, key, checkpoint=path, save_every=4, progress=False)
  step, fresh, batch_at = make_run(14, **options)
  saved = training.load_state(path, fresh)
  assert int(saved.step) == 8
  resumed = training.fit(step, saved, batch_at, 14, key, checkpoint=path, progress=False)
  jax.tree.map(np.testing.assert_array_equal, straight, resumed)
  jax.tree.map(np.testing.assert_array_equal, straight, training.load_state(path, fresh))
  assert os.listdir(tmp_path) == ['state.msgpack']


def test_what_a_kill_kept_from_being_judged_is_judged_after_resuming(tmp_path):
  key, path = jax.random.key(2), tmp_path / 'state.msgpack'
  step, state, batch_at = make_run(8)
  steps = []

  def judge(state, kill_at=None):
    if int(state.step) == kill_at:
      raise KeyboardInterrupt
    steps.append(int(state.step))
    return {'accuracy': 1.0}

  options = {'checkpoint': path, 'save_every': 2, 'evaluate_every': 4, 'progress': False}
  killed = functools.partial(judge, kill_at=4)
  with pytest.raises(KeyboardInterrupt):
    training.fit(step, state, batch_at, 8, key, evaluate=killed, **options)
  saved = training.load_state(path, state)
  assert int(saved.step) == 2
  training.fit(step, saved, batch_at, 8, key, evaluate=judge, **options)
  assert steps == [4, 8]


def test_one_step_is_the_gradient_of_smoothed_cross_entropy():
  # Closed form for a linear net: ∂loss/∂W = xᵀ(softmax − target)/B.
  image, labels = colours(6, size=2)
  step = classifying.classifier_step(
    Linear(), optax.sgd(0.5), mean=MEAN, std=STD, label_smoothing=0.3
  )
  state = classifying.init_state(Linear(), optax.sgd(0.5), (2, 2, 3), jax.random.key(0))
  new, metrics = jax.jit(step)(state, training.TrainBatch(image, labels), jax.random.key(0))
  x = ((image / 255 - np.array(MEAN)) / np.array(STD)).reshape(6, -1)
  dense = state.variables['params']['Dense_0']
  logits = x @ np.asarray(dense['kernel']) + np.asarray(dense['bias'])
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  target = 0.7 * np.eye(3)[labels] + 0.1
  expected = np.asarray(dense['kernel']) - 0.5 * x.T @ (p - target) / 6
  np.testing.assert_allclose(
    new.variables['params']['Dense_0']['kernel'], expected, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(metrics['loss'], -(target * np.log(p)).sum(1).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['accuracy'], (logits.argmax(1) == labels).mean())


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_only_kernels_decay(name):
  tx = training.optimiser(name, 0.1, 10, weight_decay=0.5)
  params = {'conv': {'kernel': jnp.ones(2), 'bias': jnp.ones(2)}, 'bn': {'scale': jnp.ones(2)}}
  opt_state = tx.init(params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  for _ in range(3):  # the rate starts at 0
    updates, opt_state = tx.update(zeros, opt_state, params)
    params = optax.apply_updates(params, updates)
  assert (params['conv']['kernel'] < 1).all()
  np.testing.assert_array_equal(params['conv']['bias'], 1)
  np.testing.assert_array_equal(params['bn']['scale'], 1)


def test_bad_optimisers():
  with pytest.raises(InputError, match="unknown optimiser 'lion'"):
    training.optimiser('lion', 0.1, 10)
  with pytest.raises(InputError, match='learning_rate is 0'):
    training.optimiser('sgd', 0, 10)


def test_each_epoch_shows_every_image_once():
  image, labels = np.arange(12, dtype=np.uint8), np.arange(12)
  batch_at = training.shuffled(image, labels, 4, seed=0)
  epochs = [np.concatenate([batch_at(3 * e + i).label for i in range(3)]) for e in range(3)]
  assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
  assert (epochs[0] != epochs[1]).any()
  np.testing.assert_array_equal(batch_at(4).image, batch_at(4).label)
  np.testing.assert_array_equal(training.shuffled(image, labels, 4, 0)(7).label, batch_at(7).label)
  with pytest.raises(InputError, match='batch_size 13 is more than the 12'):
    training.shuffled(image, labels, 13, 0)


def test_pad_crop_flip_draws_every_shift_and_mirror(key):
  x = jnp.asarray(np.random.default_rng(0).random((1, 5, 5, 3)), jnp.float32)
  out = np.asarray(training.pad_crop_flip(key, jnp.tile(x, (400, 1, 1, 1)), pad=1))
  padded = np.pad(np.asarray(x[0]), ((1, 1), (1, 1), (0, 0)))
  crops = [padded[i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
  views = np.stack(crops + [crop[:, ::-1] for crop in crops])
  hits = (out[:, None] == views).all((2, 3, 4))
  assert (hits.sum(1) == 1).all()
  assert (hits.sum(0) > 5).all()  # 400 / 18 = 22 expected of each


def test_mirror_and_relight_keeps_the_picture_up_to_symmetry_and_gain(key):
  x = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.6, (1, 5, 5, 3)), jnp.float32)
  out = np.asarray(training.mirror_and_relight(key, jnp.tile(x, (200, 1, 1, 1)), gain=0.2))
  turns = [np.rot90(np.asarray(x[0]), k) for k in range(4)]
  views = np.stack(turns + [turn[:, ::-1] for turn in turns])
  gain = out.mean((1, 2, 3)) / float(x.mean())
  assert 0.8 <= gain.min() < 0.85
  assert 1.15 < gain.max() <= 1.2
  error = np.abs(out[:, None] / gain[:, None, None, None, None] - views).max((2, 3, 4))
  assert ((error < 1e-5).sum(1) == 1).all()
  assert ((error < 1e-5).sum(0) > 5).all()


def test_evaluate_counts_real_rows_only():
  module, (image, labels) = Tiny(), colours(37)
  variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  x = ((image / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)
  expected = (np.asarray(module.apply(variables, x).logits).argmax(1) == labels).mean()
  for batch_size in (5, 37, 50):
    evaluate = classifying.make_evaluate(
      module, image, labels, mean=MEAN, std=STD, batch_size=batch_size
    )
    assert evaluate(variables) == pytest.approx(expected)


def test_nan_loss_stops_and_says_what_to_do(tmp_path):
  step, state, batch_at = make_run(40, rate=1e30)
  path = tmp_path / 'state.msgpack'
  with pytest.raises(InputError, match=r'diverged at step \d+, loss .*: lower --learning_rate'):
    training.fit(
      step,
      state,
      batch_at,
      40,
      jax.random.key(0),
      checkpoint=path,
      save_every=3,
      log_every=50,
      progress=False,
    )
  if path.exists():  # no state with NaN in it is left to resume from
    assert training.all_finite(training.load_state(path, state).variables)


def test_bad_states_are_refused(tmp_path):
  _, state, _ = make_run(5)
  path = tmp_path / 'state.msgpack'
  training.save_state(path, state)
  _, wider, _ = make_run(5, module=Tiny(features=5))
  with pytest.raises(InputError, match='other sizes'):
    training.load_state(path, wider)
  _, other, _ = make_run(5, module=Linear())
  with pytest.raises(InputError, match='damaged or of another model'):
    training.load_state(path, other)
  whole = path.read_bytes()
  for damaged in (whole[:200], b'', b'\x01', bytes([0xC1]) + whole, whole[:60] + whole[90:]):
    path.write_bytes(damaged)
    with pytest.raises(InputError, match='damaged'):
      training.load_state(path, state)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_built_in_net_s_command_ends_with_a_card(tmp_path, monkeypatch):
  """README's, cut short: its card has figures of the weights that it has just written."""
  cam = {'cam': train.interpreters.FACTORIES['cam']}
  monkeypatch.setattr(train.interpreters, 'FACTORIES', cam)
  monkeypatch.setattr(train, 'pointing_game', functools.partial(train.pointing_game, n=50))
  changes = {'steps': 2, 'num_examples': 200, 'workdir': str(tmp_path / 'run')}
  train.run(flag_defaults(_flags.define_train_flags) | changes)
  card = json.loads((tmp_path / 'run/scene_resnet.json').read_text())
  assert card['mean'] == pytest.approx([0.485, 0.456, 0.406])
  assert 0 < card['pointing_game']['chance'] < 0.5
  assert 0 <= card['accuracy'] <= 1
  clf = zoo.load_classifier('scene_resnet', tmp_path / 'run/scene_resnet.safetensors')
  assert jax.eval_shape(clf, jnp.zeros((1, 64, 64, 3))).logits.shape == (1, 10)


def run_train(cwd, *arguments):
  env = os.environ | {
    'PYTHONPATH': str(pathlib.Path(__file__).parents[2]),
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # a few steps: compiling is most of the work
  }
  command = [sys.executable, '-m', 'experiments.train', *arguments]
  return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_command_trains_resumes_and_refuses(tmp_path):
  image, labels = colours(48, size=16)
  np.savez(tmp_path / 'a.npz', image=image, label=labels)
  flags = ['--dataset=npz', '--data_path=a.npz', '--batch_size=8', '--workdir=w']
  done = run_train(tmp_path, *flags, '--steps=3')
  assert done.returncode == 0, done.stderr
  card = json.loads((tmp_path / 'w/scene_resnet.json').read_text())
  assert card['num_classes'] == 3
  assert 0 <= card['accuracy'] <= 1
  assert '--steps=3' in card['command']
  weights = tmp_path / 'w/scene_resnet.safetensors'
  classifier = zoo.load_classifier('scene_resnet', weights)
  assert classifier(jnp.zeros((2, 16, 16, 3))).logits.shape == (2, 3)

  other = run_train(tmp_path, *flags, '--steps=9', '--resume')
  assert other.returncode != 0
  assert 'steps' in other.stderr.splitlines()[-1]


@pytest.fixture
def config(tmp_path):
  """The command's flags for a data set of 48 small images."""
  image, labels = colours(48, size=16)
  np.savez(tmp_path / 'a.npz', image=image, label=labels)
  few = {'dataset': 'npz', 'data_path': str(tmp_path / 'a.npz'), 'batch_size': 8, 'steps': 3}
  return flag_defaults(_flags.define_train_flags) | few | {'workdir': str(tmp_path / 'w')}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model': 'resnet19'}, "unknown model 'resnet19'"),
    ({'std': ['1', '0', '1']}, '--std is 1,0,1; expected three numbers above 0'),
    ({'mean': ['nan', '0', '0']}, '--mean is nan,0,0; expected three numbers from 0 to 1'),
    ({'std': ['58.4', '57.1', '57.4']}, 'divide them by 255'),
    ({'data_path': 'nowhere.npz'}, 'nowhere.npz does not exist'),
    ({'batch_size': 64}, 'batch_size 64 is more than the'),
    ({'weights': 'nowhere.npz'}, 'nowhere.npz'),
    ({'learning_rate': 0.0}, 'learning_rate is 0.0; expected a positive number'),
    ({'encoder': 'resnet18'}, '--encoder resnet18: only --task rts has it'),
    ({'dataset': 'scenes'}, 'a.npz: the scenes are drawn, not read'),
    ({'dataset': 'scenes', 'data_path': None, 'test_path': 'b.npz'}, 'b.npz: the scenes are drawn'),
  ],
)
def test_the_command_names_what_is_wrong(config, monkeypatch, change, message):
  monkeypatch.setattr(classifying, 'init_state', lambda *_: None)
  with pytest.raises(InputError, match=message) as error:
    train.run(config | change)
  assert '\n' not in str(error.value)
  assert not os.path.exists(config['workdir'])


def test_the_command_writes_nowhere_else(config, tmp_path, monkeypatch):
  monkeypatch.setattr(classifying, 'init_state', lambda *_: None)
  (tmp_path / 'w').mkdir()
  (tmp_path / 'w' / 'mine.txt').write_text('keep')
  monkeypatch.setenv('HOME', str(tmp_path))
  for workdir in (config['workdir'], '~/w'):
    with pytest.raises(InputError, match=f'{tmp_path}/w is not empty'):
      train.run(config | {'workdir': workdir})


def test_a_run_whose_steps_come_from_its_epochs_can_be_resumed(config):
  """The steps it works out are no flag, and must not count as another one."""
  epochs = config | {'steps': None, 'epochs': 1}
  assert train.prepare(epochs).config['steps'] == 43 // 8
  assert train.prepare(epochs | {'resume': True}).config['steps'] == 43 // 8
  image, labels = colours(48, size=16)
  np.savez(config['data_path'], image=255 - image, label=labels)
  with pytest.raises(InputError, match=r'^data .*a\.npz changed since the run in .*w was made'):
    train.prepare(epochs | {'resume': True})


def test_a_full_disk_is_told(config, monkeypatch):
  monkeypatch.setattr(classifying, 'init_state', lambda *_: types.SimpleNamespace(step=0))

  def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(training, 'fit', full)
  with pytest.raises(InputError, match=r'cannot write .*w: No space left on device.*--resume'):
    train.run(config)
