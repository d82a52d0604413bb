"""RTS: its decoder's file, the command that trains it, and the built-in one."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import flag_defaults

from adv2_jax import api, images, interpreters, metrics
from adv2_jax import data as datasets
from adv2_jax.attacks import presets
from adv2_jax.nets import saliency_unet
from adv2_jax.training import fit as training
from adv2_jax.types import InputError
from adv2_jax.weights import zoo
from experiments import _flags, _setup, _train_rts
from experiments import train as train_command

MEAN, STD = (0.5,) * 3, (0.25,) * 3


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
  """A decoder for the scenes' net, untrained, as the command writes it."""
  module = saliency_unet.build('scene_resnet', 10, (8, 8))
  shapes = saliency_unet.variable_shapes(module)
  fill = np.random.RandomState(0)
  variables = jax.tree.map(lambda v: fill.uniform(0.1, 0.5, v.shape).astype(np.float32), shapes)
  card = dict.fromkeys(zoo.CARD_FIELDS) | {
    'model': 'rts',
    'black_box': 'scene_resnet',
    'encoder': 'scene_resnet',
    'widths': [8, 8],
    'confidence': 0.0,
    'classes': [0, 3, 4],
    'num_classes': 10,
    'mean': MEAN,
    'std': STD,
  }
  path = tmp_path_factory.mktemp('decoder') / 'rts.safetensors'
  zoo.save_checkpoint(path, variables, card)
  return path, module, variables


def test_a_stored_decoder_is_the_net_that_was_stored(stored):
  path, module, variables = stored
  loaded = zoo.load_decoder(path, 'scene_resnet')
  assert loaded.classes == (0, 3, 4)
  assert loaded.num_classes == 10
  assert zoo.load_decoder(path).apply_fn is loaded.apply_fn  # nothing is traced anew
  x, y = tiny.images(2, 64), jnp.array([3, 4])
  expected = jax.jit(module.apply)(variables, (x - 0.5) / 0.25, y)
  seen = jax.jit(loaded.apply_fn)(loaded.params, x, y)
  np.testing.assert_allclose(seen.map, expected.map, atol=0.02)  # kernels are stored in float16
  np.testing.assert_allclose(seen.encoder.logits, expected.encoder.logits, rtol=0.01)


def test_decoders_that_do_not_fit_are_refused(stored, tmp_path):
  path = stored[0]
  with pytest.raises(InputError, match='trained to explain scene_resnet, not resnet18'):
    zoo.load_decoder(path, 'resnet18')
  with pytest.raises(InputError, match='no card of a saliency decoder'):
    zoo.load_decoder('scene_resnet')
  card = json.loads(path.with_suffix('.json').read_text())
  for name, value, message in (
    ('num_classes', 7, "'encoder.fc.bias' has shape .10., expected .7."),
    ('encoder', 'cifar_resnet20', 'is missing|is unexpected|has shape'),
    ('widths', [16, 8], 'has shape'),
    ('classes', [3], r'has the classes \[3\]; expected two or more of 0…9, rising'),
    ('classes', [4, 0, 3], r'has the classes \[4, 0, 3\]; expected'),
    ('classes', [0, 10], r'has the classes \[0, 10\]; expected'),
  ):
    other = tmp_path / f'{name}.safetensors'
    other.write_bytes(path.read_bytes())
    other.with_suffix('.json').write_text(json.dumps(card | {name: value}))
    with pytest.raises(InputError, match=message):
      zoo.load_decoder(other)


def test_a_decoder_is_refused_with_other_weights_of_its_net(stored, tmp_path):
  tensors = zoo.read_tensors('scene_resnet')
  same, other = tmp_path / 'same.npz', tmp_path / 'other.npz'
  np.savez(same, **tensors)
  np.savez(other, **tensors | {'fc.bias': tensors['fc.bias'] + 1})
  path = tmp_path / 'rts.safetensors'
  path.write_bytes(stored[0].read_bytes())
  card = json.loads(stored[0].with_suffix('.json').read_text())
  known = {'black_box_digest': zoo.digest('scene_resnet')}
  path.with_suffix('.json').write_text(json.dumps(card | known))
  zoo.load_decoder(path, 'scene_resnet', same)  # the format does not matter
  with pytest.raises(InputError, match=r'scene_resnet with other weights than .*other\.npz'):
    zoo.load_decoder(path, 'scene_resnet', other)


def test_a_decoder_computes_in_the_dtype_asked_for(stored):
  x, y = tiny.images(2, 64), jnp.array([3, 4])
  whole, half = (zoo.load_decoder(stored[0], dtype=t) for t in (jnp.float32, jnp.bfloat16))
  a, b = (jax.jit(d.apply_fn)(d.params, x, y).map for d in (whole, half))
  assert a.dtype == b.dtype == jnp.float32
  assert 0 < float(jnp.abs(a - b).max()) < 0.05


def test_classes_that_the_selector_never_saw_are_refused(stored):
  interp = interpreters.build('rts', decoder=zoo.load_decoder(stored[0]))
  x, clf = tiny.images(2, 64), zoo.load_classifier('scene_resnet')
  with pytest.raises(InputError, match='target of image 1 is 5, a class that rts never saw'):
    api.attack(clf, interp, x, target=[3, 5], label=[0, 0])
  with pytest.raises(InputError, match=r'label of image 0 is 7, .* it knows 0, 3, 4'):
    api.attack(clf, interp, x, target=[3, 4], label=[7, 0])
  with pytest.raises(InputError, match='rts needs a trained decoder'):
    interpreters.build('rts')


def test_the_command_trains_a_decoder_that_the_attack_takes(tmp_path):
  """Selector and decoder, stopped in the second epoch of the latter, and resumed."""
  flags = flag_defaults(_flags.define_train_flags) | {
    'task': 'rts',
    'image_size': 32,
    'num_examples': 16,
    'batch_size': 8,
    'selector_steps': 2,
    'steps': 5,
    'widths': ['8', '8'],
    'loss_weights': ['0', '100', '0', '0'],
    'workdir': str(tmp_path / 'w'),
  }

  def killed(batch_at, phase_steps):
    def at(step):
      if phase_steps == 5 and step == 4:
        raise KeyboardInterrupt
      return batch_at(step)

    return at

  original = training.fit
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_train_rts, 'HELD_OUT', 9)
    patch.setattr(_train_rts, '_BATCH', 9)
    patch.setattr(train_command, 'SAVE_EVERY', 3)
    patch.setattr(_train_rts, '_SHOWN', 3)
    train_command.run(flags | {'workdir': str(tmp_path / 'whole')})
    patch.setattr(
      training, 'fit', lambda f, s, at, n, key, **k: original(f, s, killed(at, n), n, key, **k)
    )
    with pytest.raises(KeyboardInterrupt):
      train_command.run(flags)
    patch.setattr(training, 'fit', original)
    train_command.run(flags | {'resume': True})
  folder, whole = tmp_path / 'w', tmp_path / 'whole'
  for name in ('rts.safetensors', 'state.msgpack'):
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
  with (folder / 'log.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [(row['phase'], row['step']) for row in rows if row['held_out_marked']] == [
    ('state', '2'),
    ('state', '4'),
    ('state', '5'),
  ]
  pictures = [p.name for p in sorted((folder / 'figures').glob('*.png'))]
  assert pictures == ['maps-000002.png', 'maps-000004.png', 'maps-000005.png']
  assert 0 < float(rows[-1]['held_out_marked']) < 1
  last = next(row for row in rows[::-1] if row['loss'])
  presence = float(last['loss']) - 100 * float(last['area'])  # the rest of the loss
  assert 0 < presence < 5
  assert (folder / 'figures/maps-000002.png').stat().st_size > 10_000
  card = json.loads((folder / 'rts.json').read_text())
  assert card['held_out']['marked'] == pytest.approx(float(rows[-1]['held_out_marked']), abs=0.02)
  assert 0 <= card['held_out']['pointing_game'] <= 1
  stored = folder / 'rts.safetensors'
  decoder = zoo.load_decoder(stored, 'scene_resnet', 'scene_resnet')
  encoder = zoo.load_classifier('scene_resnet').params['params']
  frozen = decoder.params['params']['encoder']
  jax.tree.map(np.testing.assert_array_equal, dict(frozen), dict(encoder))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'encoder': 'vgg16'}, "unknown model 'vgg16'"),
    ({'encoder_weights': 'nowhere.npz'}, "no weights at 'nowhere.npz'"),
    ({'encoder': 'cifar_resnet20', 'encoder_weights': 'scene_resnet'}, 'as the encoder cifar'),
    ({'fake': 1.0}, '--fake is 1.0; expected 0 or more, and less than 1'),
    ({'confidence': float('nan')}, '--confidence is nan; expected a number'),
    ({'widths': ['8']}, '--widths has 1 numbers; scene_resnet needs 2'),
    ({'widths': ['8', 'x']}, '--widths is 8,x; expected'),
    ({'loss_weights': ['1', '8', '-1', '0.3']}, '--loss_weights is 1,8,-1,0.3; expected four'),
    ({'loss_weights': ['1', '8']}, '--loss_weights is 1,8; expected four numbers from 0 on'),
    ({'loss_weights': ['0', '0', '0', '0']}, '--loss_weights is 0,0,0,0; .* not all 0'),
    ({'label_smoothing': 0.0}, '--label_smoothing 0.0: only --task classifier has it'),
    ({'image_size': 60}, 'features of 8×8 and 15×15 cells, .* a multiple of 32 px'),
    ({'num_examples': 1, 'batch_size': 1}, 'all training images are of class'),
    ({'std': ['1', '1', '0']}, '--std is 1,1,0; expected three numbers above 0'),
    (
      {'only_correct': True, 'batch_size': 16, 'std': ['0.01'] * 3},
      r'--only_correct leaves \d+ of 16 training images; expected at least --batch_size, 16',
    ),
  ],
)
def test_the_command_names_what_is_wrong(tmp_path, monkeypatch, change, message):
  monkeypatch.setattr(_train_rts, 'HELD_OUT', 8)
  few = {'task': 'rts', 'num_examples': 16, 'batch_size': 8, 'workdir': str(tmp_path / 'w')}
  with pytest.raises(InputError, match=message):
    train_command.run(flag_defaults(_flags.define_train_flags) | few | change)
  assert not (tmp_path / 'w').exists()


def test_labels_follow_the_names_of_the_black_box_s_classes(tmp_path):
  for name in ('spotted star', 'spotted square'):
    for i, image in enumerate(np.random.RandomState(0).randint(0, 256, (6, 64, 64, 3), np.uint8)):
      images.write_png(tmp_path / 'data' / name / f'{i}.png', image)
  flags = flag_defaults(_flags.define_train_flags) | {
    'task': 'rts',
    'dataset': 'folder',
    'data_path': str(tmp_path / 'data'),
    'batch_size': 2,
    'workdir': str(tmp_path / 'w'),
  }
  job = train_command.prepare(flags)
  assert set(job.train.label.tolist()) == {3, 7}
  (tmp_path / 'data' / 'spotted star').rename(tmp_path / 'data' / 'planet')
  with pytest.raises(InputError, match="class 'planet' of folder is none of the classifier's"):
    train_command.prepare(flags | {'workdir': str(tmp_path / 'v')})


def test_black_box_and_encoder_have_the_means_given():
  flags = flag_defaults(_flags.define_train_flags) | train_command.DEFAULTS['rts']
  x, grey = tiny.images(2, 64), ['0.5', '0.5', '0.5']
  logits, other = (
    tiny.outputs(_train_rts.black_box(flags | {'mean': m}), x).logits for m in (None, grey)
  )
  expected = zoo.load_classifier('scene_resnet', mean=(0.5,) * 3)
  np.testing.assert_array_equal(other, tiny.outputs(expected, x).logits)
  assert np.abs(other - logits).max() > 0.01

  def means(**given):
    return _train_rts.encoder_input(flags | given)[0]

  card = means()
  assert means(mean=grey) == (0.5,) * 3
  assert means(mean=grey, encoder_mean=['0', '0', '0']) == (0.0,) * 3
  assert means(mean=grey, encoder='scene_resnet', encoder_weights='scene_resnet') == (0.5,) * 3
  assert means(encoder_mean=grey) == (0.5,) * 3 != card


def test_wrong_flags_are_told_before_data_is_opened(tmp_path, monkeypatch):
  monkeypatch.setattr(train_command, 'open_data', lambda c: pytest.fail('opened'))
  for name, value in (('loss_weights', ['1']), ('widths', ['x', '8']), ('fake', 1.0)):
    flags = flag_defaults(_flags.define_train_flags) | {'task': 'rts', name: value}
    with pytest.raises(InputError, match=f'--{name} is'):
      train_command.run(flags | {'workdir': str(tmp_path / 'w')})


def test_the_card_s_figures_also_for_the_images_that_the_black_box_gets_right(stored):
  _, module, variables = stored
  clf, data = zoo.load_classifier('scene_resnet'), datasets.load('scenes')
  variables = {**variables, 'black_box': clf.params}
  image, label = data.images(range(12)), np.array(data.labels[:12])
  assert (np.asarray(tiny.outputs(clf, image / np.float32(255)).logits.argmax(-1)) == label).all()
  label[[2, 5, 7]] = (label[[2, 5, 7]] + 1) % 10
  zero, one = (0.0,) * 3, (1.0,) * 3
  net = _train_rts.Net(module, clf, variables, zero, one, None, '')
  judge = _train_rts.Judge(net, image, label)
  card = judge.card(variables, data, np.arange(12))
  flags = flag_defaults(_flags.define_train_flags)
  assert np.flatnonzero(~_train_rts.correct(flags, image, label)).tolist() == [2, 5, 7]
  by_hand = judge.judged(variables, label)
  kept = np.delete(np.arange(12), [2, 5, 7])
  right = card['held_out_correct']
  assert right['n'] == 9
  for name in ('p_whole', 'p_kept', 'marked'):
    values = getattr(by_hand, name)
    assert right[name] == pytest.approx(values[kept].mean(), rel=1e-5)
    assert card['held_out'][name] == pytest.approx(values.mean(), rel=1e-5)
  p = jax.nn.softmax(tiny.outputs(clf, image / np.float32(255)).logits)
  np.testing.assert_allclose(by_hand.p_whole, np.asarray(p)[np.arange(12), label], atol=1e-4)


def test_random_targets_of_a_run_are_classes_that_its_decoder_knows(stored):
  flags = flag_defaults(_flags.define_data_flags, _flags.define_attack_flags)
  flags |= {'interpreters': ['cam', 'rts'], 'decoder': str(stored[0])}
  setup = _setup.load(flags)
  targets = np.array([setup.target_of(i, setup.dataset.labels[i], -1) for i in range(200)])
  assert set(targets.tolist()) == {0, 3, 4}
  assert (targets != setup.dataset.labels[:200]).all()
  with pytest.raises(InputError, match=r'--target_classes 1,3 has some that rts never saw'):
    _setup.load(flags | {'target_classes': ['3', '1']})
  # Without RTS, the same targets by name.
  alike = _setup.load(
    flags | {'interpreters': ['cam'], 'decoder': None, 'target_classes': ['4', '0', '3']}
  )
  assert [alike.target_of(i, setup.dataset.labels[i], -1) for i in range(200)] == targets.tolist()


def test_the_attack_on_the_built_in_decoder_keeps_its_map():
  clf, data = zoo.load_classifier('scene_resnet'), datasets.load('scenes')
  rts = interpreters.rts(zoo.load_decoder('scene_rts', 'scene_resnet'))
  x, y = jnp.asarray(data.images(range(4)) / np.float32(255)), jnp.asarray(data.labels[:4])
  benign = jax.jit(rts.explain)(clf, x, y, jax.random.key(0))
  given = {'target': (y + 2) % 10, 'label': y}
  plain = api.attack(clf, rts, x, preset=presets.plain_pgd('fast'), **given)
  joint = api.attack(clf, rts, x, steps=40, **given)
  assert joint.success.all()
  apart = [float(metrics.map_mse(r.maps, benign).mean()) for r in (joint, plain)]
  assert apart[0] < 0.3 * apart[1]


def test_the_built_in_decoder_points_at_the_object():
  """On scenes that it was not trained on, and at nothing where the class is not there."""
  clf, data = zoo.load_classifier('scene_resnet'), datasets.load('scenes')
  rts = interpreters.rts(zoo.load_decoder('scene_rts', 'scene_resnet'))
  x, y = jnp.asarray(data.images(range(64)) / np.float32(255)), jnp.asarray(data.labels[:64])
  mask = jnp.asarray(np.stack([data.mask(i) for i in range(64)]))
  explain = jax.jit(rts.explain)
  shown = explain(clf, x, y, jax.random.key(0))
  absent = explain(clf, x, (y + 3) % 10, jax.random.key(0))
  assert metrics.pointing_game(shown, mask).mean() >= 0.95
  assert metrics.energy_inside(shown, mask).mean() >= 0.7
  assert absent.mean() < 0.1 * shown.mean()
