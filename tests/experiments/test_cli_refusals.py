"""`experiments.attack`: bad input is told in one line, before anything is written."""

import pathlib

import numpy as np
import pytest
from cli import command, contents, run

from adv2_jax.types import InputError
from experiments import attack


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'epsilon': 0.0}, '--epsilon is 0.0; expected 0 < epsilon ≤ 1'),
    ({'epsilon': 8.0}, '--epsilon is 8.0'),
    ({'epsilon': float('nan')}, '--epsilon is nan'),
    ({'num_examples': 0}, '--num_examples is 0; expected at least 1'),
    ({'batch_size': -1}, '--batch_size is -1'),
    ({'steps_s2': 0}, '--steps_s2 is 0'),
    ({'steps_s1': -1}, '--steps_s1 is -1'),
    ({'seed': -1}, '--seed is -1'),
    ({'num_devices': 99}, '--num_devices is 99; this machine has 8'),
    ({'model': 'vgg16'}, "--model 'vgg16' is unknown; expected one of .*resnet18"),
    ({'interpreters': ['cam', 'lime']}, "interpreter 'lime' is unknown; expected one of grad, cam"),
    ({'interpreters': []}, '--interpreters is'),
    ({'interpreters': ['cam', 'cam']}, 'expected one or more distinct names'),
    ({'dataset': 'mnist'}, 'mnist.*scenes'),
    ({'data_path': 'nowhere.npz'}, '--data_path nowhere.npz does not exist'),
    ({'dataset': 'scenes'}, r'data.npz: the scenes are drawn, not read'),
    ({'decoder': 'rts.safetensors'}, '--decoder rts.safetensors: only rts has one'),
    ({'data_path': None}, '--dataset npz needs --data_path'),
    ({'weights': 'nowhere.npz'}, 'nowhere.npz'),
    ({'target_map': 'circle'}, "--target_map is 'circle'; expected benign, random_class"),
    (
      {'interpreters': ['mask'], 'target_map': 'away', 'goal': 'map_only', 'target_label': None},
      'mask under --preset fast comes close to',
    ),
    (
      {
        'preset': 'dombrowski',
        'goal': 'map_only',
        'target_label': None,
        'target_map': 'random_patch',
      },
      'maps made of gradients; cam.s is not',
    ),
    (
      {
        'preset': 'dombrowski',
        'goal': 'map_only',
        'target_label': None,
        'target_map': 'random_patch',
        'interpreters': ['grad', 'cam', 'joint'],
        'attacks': ['adv2_joint'],
      },
      'maps that have a formula; joint has none',
    ),
    ({'interpreters': ['cam', 'joint']}, 'cam,joint: joint attacks two interpreters or more'),
    ({'interpreters': ['cam', 'joint', 'joint', 'grad']}, 'joint attacks two interpreters or more'),
    ({'interpreters': ['cam', 'rts', 'joint']}, 'no built-in decoder for scene_resnet with .*net'),
    (
      {'interpreters': ['cam', 'grad', 'joint'], 'preset': 'authors'},
      '--preset authors has no joint attack, nobody published one',
    ),
    (
      {'interpreters': ['cam', 'grad', 'joint'], 'framework': 'stadv', 'epsilon': None},
      'joint: --framework stadv has no joint attack so far',
    ),
    (
      {'interpreters': ['cam', 'grad', 'joint'], 'goal': 'class_only'},
      'joint: --goal class_only looks at no map',
    ),
    ({'interpreters': ['cam', 'foo']}, "interpreter 'foo' is unknown; .*; an attack takes joint"),
    ({'target_map': 'nope'}, "--target_map is 'nope'; expected .*, path:A such as path:0.5, or"),
    ({'attacks': ['pgd', 'adv3']}, '--attacks is pgd,adv3; expected some of benign, again'),
    ({'attacks': []}, '--attacks is ; expected some of benign'),
    (
      {'interpreters': ['rts']},
      'no built-in decoder for scene_resnet with .*net.safetensors',
    ),
    ({'goal': 'both'}, "--goal is 'both'; expected one of deceive, map_only, class_only"),
    ({'target_map': 'away'}, '--target_map away needs --goal map_only'),
    ({'goal': 'map_only'}, '--goal map_only with --target_map benign'),
    (
      {'goal': 'map_only', 'target_map': 'away', 'target_label': '3'},
      '--target_label 3: with --goal map_only the class stays',
    ),
    ({'target_map': 'path:2'}, '--target_map is path:2; expected path:A with A from 0'),
    ({'target_label': 'best'}, "--target_label is 'best'; expected random, least_likely"),
    ({'target_label': 'no.csv'}, "--target_label is 'no.csv': there is no such file"),
    ({'target_label': '10'}, 'target 10 is outside 0…9'),
    ({'target_classes': ['3']}, '--target_classes is 3; expected two classes or more of 0…9'),
    ({'target_classes': ['3', '10']}, '--target_classes is 3,10; expected two'),
    ({'target_classes': ['3', '3', '4']}, '--target_classes is 3,3,4; expected two'),
    ({'target_classes': ['a', '3']}, '--target_classes is a,3; expected two'),
    (
      {'target_classes': ['3', '4'], 'target_label': 'runner_up'},
      '--target_classes with --target_label runner_up: only random',
    ),
    ({'mean': ['0.5', 'x', '0.5']}, '--mean is 0.5,x,0.5; expected three numbers from 0 to 1'),
    ({'std': ['0.5', '0', '0.5']}, '--std is 0.5,0,0.5; expected three numbers above 0'),
  ],
)
def test_bad_flags_are_told_before_anything_is_written(victim, tmp_path, change, message):
  workdir = tmp_path / 'run'
  with pytest.raises(InputError, match=message) as error:
    run(victim, workdir, **change)
  assert '\n' not in str(error.value)
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('shift', 'message'),
  [
    (5, r'gets 0 of 10 images right \(0.0%\), .*check --weights'),
    (1, 'count from 1, while the classifier counts its classes from 0: take 1 off each'),
  ],
)
def test_a_classifier_that_gets_nothing_right(victim, tmp_path, shift, message):
  arrays = dict(np.load(victim['data_path']))
  wrong = np.where(np.arange(10) < 2, arrays['label'], (arrays['label'] + shift) % 10)
  np.savez(tmp_path / 'data.npz', image=arrays['image'], label=wrong)
  with pytest.raises(InputError, match=message):
    run(victim, tmp_path / 'run', data_path=str(tmp_path / 'data.npz'))
  assert not (tmp_path / 'run').exists()


def test_an_image_outside_of_the_set_is_told_and_not_written(victim, tmp_path, monkeypatch):
  real = attack.api.attack_batch

  def far(*given, **options):
    x8, history = real(*given, **options)
    return 1 - x8, history

  monkeypatch.setattr(attack.api, 'attack_batch', far)
  with pytest.raises(InputError, match='pgd on cam: the image of example 2 is outside') as error:
    run(victim, tmp_path / 'run', num_examples=2)
  assert '\n' not in str(error.value)
  assert not contents(tmp_path / 'run', 'examples/pgd')


def test_as_a_command_a_refusal_is_the_last_line_on_stderr(victim, tmp_path):
  """Weights that would have to be unpickled; no traceback, nothing written, exit code not 0."""
  (tmp_path / 'net.pth').write_bytes(b'\x80\x02}q\x00.')
  done = command(victim | {'weights': 'net.pth', 'workdir': 'run'}, tmp_path)
  assert done.returncode != 0
  last = done.stderr.strip().splitlines()[-1]
  assert 'net.pth' in last
  assert 'experiments.convert' in last
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


def test_half_a_weights_file(victim, tmp_path):
  whole = pathlib.Path(victim['weights']).read_bytes()
  half = tmp_path / 'half.safetensors'
  half.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(InputError, match=r'half\.safetensors') as error:
    run(victim, tmp_path / 'run', weights=str(half))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()
