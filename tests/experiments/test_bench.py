"""experiments.bench: both sides do the same step, in turns; figures and bad flags."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import flag_defaults

from adv2_jax import nets
from adv2_jax.classifier import IMAGENET_MEAN, IMAGENET_STD, from_linen
from adv2_jax.nets.resnet import Bottleneck, ResNet
from adv2_jax.types import InputError
from adv2_jax.weights import zoo
from experiments import _flags, bench

SIZE, CLASSES = 64, 12


def config(**changes):
  return flag_defaults(_flags.define_bench_flags) | changes


@functools.cache
def tiny():
  module = ResNet((1, 1, 1, 1), Bottleneck, CLASSES)
  return module, bench.random_variables(module, SIZE)


@pytest.fixture
def torch_step(monkeypatch):
  step = pytest.importorskip('experiments._torch_step', reason='torch is in the extra `bench`')
  monkeypatch.setitem(step.BLOCKS, 'resnet50', (1, 1, 1, 1))
  step.torch.set_num_threads(1)  # its threads spin while they wait: slow where tests share cores
  return step


@pytest.mark.parametrize(('step', 'tolerance'), [('cam', 1e-4), ('grad', 5e-3)])
def test_torch_does_the_same_step(torch_step, step, tolerance):
  clf = from_linen(*tiny())
  mean, std = (np.float32(v) for v in (IMAGENET_MEAN, IMAGENET_STD))
  batch = bench.make_batch(2, SIZE, CLASSES, 2 if step == 'cam' else SIZE // 4)
  bind = torch_step.make('resnet50', zoo.to_tensors(clf.params), mean, std, 'float32', 'cpu')
  theirs = bind(
    step, *map(np.asarray, batch[1:4]), bench.WEIGHT, bench.EPSILON, bench.ALPHA
  )  # fmt: skip
  ours, theirs = bench.first_gradient(clf, step, batch), theirs(1)
  assert np.abs(theirs).max() > 0
  assert np.linalg.norm(ours - theirs) < tolerance * np.linalg.norm(theirs)


def test_timed_steps_move_the_images_inside_the_ball():
  clf = from_linen(*tiny())
  batch = bench.make_batch(2, SIZE, CLASSES, 2)
  run, figures = bench.compile_steps(clf, 'cam', batch)
  delta = np.asarray(run())
  assert batch.x.nbytes < figures['gib'] * 2**30 < 2**30
  assert 1.5 * bench.ALPHA < np.abs(delta).max() < (bench.CHUNK + 0.01) * bench.ALPHA


@pytest.mark.slow
def test_the_memory_of_the_alternation_hardly_grows_with_its_looks():
  """Activations kept until the backward pass would cost as much for each of them."""
  clf = from_linen(*tiny())
  few, many = (bench.measure(clf, 'alternation', 2, SIZE, k, 1, None, None)['gib'] for k in (2, 10))
  assert 0.9 * few < many < 1.1 * few


def test_random_weights_keep_activations_of_order_one():
  module, variables = tiny()
  noise = jax.random.normal(jax.random.key(5), (4, SIZE, SIZE, 3))
  taps = module.apply(variables, noise).taps
  for name, tap in taps.items():
    assert 0.1 < float(jnp.std(tap)) < 10, name


def test_sides_take_turns():
  order = []
  seconds = bench.take_turns({s: functools.partial(order.append, s) for s in 'ab'}, repeats=3)
  assert order == list('ab' * 4)  # the first turn warms up
  assert {name: s.shape for name, s in seconds.items()} == {'a': (3,), 'b': (3,)}


def test_forward_flops_are_those_counted_by_hand():
  module = nets.build('scene_resnet')
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  clf = from_linen(module, jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), shapes))
  # Multiply-adds of the convolutions: stem 32²·75·16, stage 1, stage 2, stage 3, projections.
  stage1 = 32**2 * 9 * 16 * 16 * 2
  stage2 = 16**2 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
  stage3 = 8**2 * (9 * 32 * 96 + 3 * 9 * 96 * 96 + 32 * 96)
  expected = 2 * (32**2 * 75 * 16 + stage1 + stage2 + stage3)
  flops = bench.forward_flops(clf, jnp.zeros((1, 64, 64, 3)))
  assert 0.9 * expected < flops < 1.15 * expected  # padding is not multiplied; batch norms are


@pytest.mark.slow
def test_the_whole_command(torch_step, monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(nets.ZOO, 'resnet50', functools.partial(ResNet, (1, 1, 1, 1), Bottleneck))
  monkeypatch.setattr(bench, 'matmul_flops', lambda n, dtype: 1e11)
  out, small = tmp_path / 'bench.json', {'steps': ['cam'], 'repeats': 1, 'image_size': 64}
  bench.main(config(**small, batch_sizes=['1', '2'], out=str(out)))
  text = capsys.readouterr().out
  figures = json.loads(out.read_text())
  assert [row['batch_size'] for row in figures['rows']] == [1, 2]
  assert text.count('torch / jax') == 1
  for row in figures['rows']:
    assert row['gradient_difference'] < 1e-3
    assert row['ratio'] == pytest.approx(row['seconds_torch'] / row['seconds_jax'])
    assert f'{row["seconds_jax"]:.4f}' in text
  monkeypatch.setattr(bench, 'torch_side', lambda *_: None)
  bench.main(config(**small, batch_sizes=['1']))
  assert 'timed alone' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('values', 'named'),
  [
    ({'batch_sizes': ['4', 'x']}, '--batch_sizes is 4,x'),
    ({'batch_sizes': ['0']}, '--batch_sizes is 0'),
    ({'steps': ['rts']}, "--steps has 'rts'"),
    ({'looks': ['0']}, '--looks is 0'),
    ({'repeats': 0}, '--repeats is 0'),
    ({'weights': '/nowhere/resnet50.npz'}, '/nowhere/resnet50.npz'),
  ],
)
def test_bad_flags(values, named):
  with pytest.raises(InputError, match=named):
    bench.bench(config(**values))


def test_figures_that_cannot_be_written(tmp_path, monkeypatch):
  monkeypatch.setattr(bench, 'bench', lambda config: {})
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match=r'cannot write .*file.*choose another --out'):
    bench.main(config(out=str(tmp_path / 'file' / 'bench.json')))


def test_figures_go_to_a_user_s_home(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(bench, 'bench', lambda config: {})
  monkeypatch.setenv('HOME', str(tmp_path))
  bench.main(config(out='~/bench.json'))
  assert (tmp_path / 'bench.json').exists()
  assert str(tmp_path) in capsys.readouterr().out
