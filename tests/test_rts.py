"""RTS: net, losses and interpreter against the published code's numbers; its training."""

import csv
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from conftest import PARITY, flag_defaults
from parity.weights import numpy_weights

from adv2_jax import (
  api,
  checkpoints,
  images,
  interpreters,
  losses,
  metrics,
  nets,
  presets,
  saliency,
  training,
)
from adv2_jax import data as datasets
from adv2_jax.interpreters.rts import Decoder
from adv2_jax.nets import saliency_unet
from adv2_jax.nets.saliency_unet import SaliencyUnet, pixel_shuffle
from adv2_jax.training import TrainBatch, TrainState
from adv2_jax.types import InputError, Outputs
from experiments import _flags, _setup, _train_rts
from experiments import train as train_command

MEAN, STD = (0.5,) * 3, (0.25,) * 3


class TinyEncoder(nn.Module):
  """Three levels of taps, as the zoo's nets have; 16 pixels give 4×4 features."""

  num_classes: int = tiny.CLASSES

  @nn.compact
  def __call__(self, x, train=False):
    del train
    taps = {}
    for name, features, stride in (('stage1', 4, 1), ('stage2', 8, 2), ('features', 8, 2)):
      x = nn.relu(nn.Conv(features, (3, 3), stride, name=f'conv_{name}')(x))
      taps[name] = x
    return Outputs(nn.Dense(self.num_classes, name='fc')(x.mean((1, 2))), taps)


UNET = SaliencyUnet(TinyEncoder(), (8, 8), tiny.CLASSES)
X = tiny.images(4)
Y = jnp.array([0, 3, 4, 2])


@pytest.fixture(scope='module')
def variables():
  return jax.jit(UNET.init)(jax.random.key(0), X, Y)


# --- the published numbers ------------------------------------------------------------------------


@pytest.mark.parametrize('confidence', [0, pytest.param(6, marks=pytest.mark.slow)])
def test_maps_and_their_gradient_agree_with_the_published_decoder(confidence):
  golden = np.load(PARITY / 'rts_resnet50.npz')
  tensors = numpy_weights(json.loads(str(golden['shapes'])), int(golden['seed']))
  net = SaliencyUnet(nets.build('resnet50'), (256, 128, 64), 1000, float(confidence))
  shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)), Y[:1])
  variables = checkpoints.from_tensors(shapes, tensors, 'golden')
  x = jnp.asarray(np.random.RandomState(1).rand(2, 224, 224, 3), jnp.float32)
  wanted = np.random.RandomState(6).rand(2, 1, 56, 56)[:, 0].astype(np.float32)

  @jax.jit
  def run(variables, x):
    def error(x):
      seen = net.apply(variables, x, jnp.array([3, 7]))
      return jnp.sum(losses.map_mse(seen.map, wanted)), seen

    return jax.grad(error, has_aux=True)(x)

  gradient, seen = run(variables, (x - 0.5) * 4)
  of = lambda name: golden[f'{name}_c{confidence}']  # noqa: E731
  np.testing.assert_allclose(seen.map, of('map'), atol=1e-5)
  np.testing.assert_allclose(seen.exists, of('exists_logits'), atol=1e-5)
  np.testing.assert_allclose(seen.encoder.logits, of('class_logits'), rtol=1e-4, atol=1e-4)
  difference = gradient[:, ::4, ::4] - of('mse_grad_input')
  assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(of('mse_grad_input'))


def test_losses_agree_with_the_published_ones():
  golden = np.load(PARITY / 'rts_losses.npz')
  mask, image, logits, y = (jnp.asarray(golden[k]) for k in ('mask', 'image', 'logits', 'labels'))
  mean = lambda v: float(np.mean(v))  # noqa: E731
  np.testing.assert_allclose(mean(saliency.smoothness(mask)), golden['smoothness'], rtol=1e-5)
  np.testing.assert_allclose(mean(saliency.area(mask)), golden['area_p03'], rtol=1e-5)
  np.testing.assert_allclose(mean(saliency.hinge_keep(logits, y)), golden['hinge_keep'], rtol=1e-5)
  np.testing.assert_allclose(
    mean(saliency.hinge_destroy(logits, y)), golden['hinge_destroy'], rtol=1e-5
  )
  blurred = saliency.gaussian_blur(image)
  np.testing.assert_allclose(blurred, golden['blurred'], atol=1e-5)
  np.testing.assert_allclose(
    saliency.blend(mask, image, blurred), golden['masked_by_blur'], atol=1e-5
  )


def test_pixel_shuffle_by_hand():
  x = jnp.arange(8.0).reshape(1, 1, 1, 8)
  np.testing.assert_array_equal(pixel_shuffle(x)[0, ..., 0], [[0, 1], [2, 3]])
  np.testing.assert_array_equal(pixel_shuffle(x)[0, ..., 1], [[4, 5], [6, 7]])


# --- the training's parts -------------------------------------------------------------------------


def test_substitutes_are_blurs_or_coloured_noise_half_and_half():
  x = jnp.full((200, 32, 32, 3), 0.5)
  filling = saliency.substitute(x, jax.random.key(0))
  kept = np.asarray(filling.kept - x)
  np.testing.assert_allclose([kept.mean(), kept.std()], [0, 0.015], atol=1e-3)
  spread = np.asarray(filling.image).std((1, 2)).mean(-1)  # noise: 0.055; a blur is smoother
  centre = np.asarray(filling.image).mean((1, 2))
  noise = np.abs(spread - 0.055) < 0.01
  assert 60 < noise.sum() < 140
  assert np.abs(centre[noise] - 0.5).max() < 0.165 + 0.01
  assert centre[noise].std() > 0.05


def test_fake_classes_are_other_classes_in_the_share_asked_for():
  y = jnp.arange(2000) % 7
  asked, present = saliency.classes_asked_for(jax.random.key(1), y, range(7), 0.3)
  assert (asked[present] == y[present]).all()
  assert (asked[~present] != y[~present]).all()
  assert set(np.asarray(asked).tolist()) == set(range(7))
  assert abs(float(present.mean()) - 0.7) < 0.04
  some = jnp.array([2, 5, 900])
  asked, present = saliency.classes_asked_for(jax.random.key(1), some[y % 3], [2, 5, 900], 0.5)
  assert set(np.asarray(asked[~present]).tolist()) == {2, 5, 900}
  assert (asked[~present] != some[y % 3][~present]).all()


def test_the_loss_wants_the_mask_that_decides():
  """A black box that looks at the left half only: the left mask is best, for a true class."""

  def logits(x):
    evidence = 20 * (x[:, :, :8].mean((1, 2, 3)) - 0.5)
    return jnp.stack([evidence, -evidence], axis=-1)

  x, y = jnp.full((1, 16, 16, 3), 0.95), jnp.zeros(1, jnp.int32)
  left = jnp.zeros((1, 16, 16)).at[:, :, :8].set(1.0)
  candidates = {'left': left, 'right': 1 - left, 'all': 0 * left + 1, 'none': 0 * left}

  def loss(mask, present, weights=saliency.PUBLISHED):
    keys = jax.random.split(jax.random.key(0), 20)
    shown = jnp.array([present])
    one = lambda k: saliency.training_loss(logits, mask, x, y, shown, k, weights)[0]  # noqa: E731
    return float(jax.vmap(one)(keys).mean())

  lenient = saliency.PUBLISHED._replace(area=4.0, smoothness=0.0)
  true = {name: loss(mask, True, lenient) for name, mask in candidates.items()}
  assert min(true, key=true.get) == 'left', true
  empty, half = (loss(candidates[n], True, lenient._replace(area=1e3)) for n in ('none', 'left'))
  assert empty < half
  y = jnp.ones(1, jnp.int32)  # a class that the image does not show
  fake = {name: loss(mask, False) for name, mask in candidates.items()}
  assert min(fake, key=fake.get) == 'none'


def train(step_fn, state, steps):
  step = jax.jit(step_fn)
  image = np.asarray(X * 255).round().astype(np.uint8)
  seen = []
  for i in range(steps):
    state, metrics = step(state, TrainBatch(image, np.asarray(Y)), jax.random.key(i))
    seen.append({k: float(v) for k, v in metrics.items()})
  return state, seen


def test_the_selector_learns_and_nothing_else_moves(variables):
  tx = optax.adam(0.3)
  embedding = variables['params']['selector_module']['embedding']
  state = TrainState(jnp.int32(0), dict(variables), tx.init(embedding))
  after, seen = train(saliency.selector_step(UNET, tx, mean=MEAN, std=STD), state, 150)
  assert np.mean([m['accuracy'] for m in seen[-30:]]) > 0.85
  for name, part in after.variables['params'].items():
    same = jax.tree.map(lambda a, b: bool((a == b).all()), part, variables['params'][name])
    assert all(jax.tree.leaves(same)) == (name != 'selector_module')


@pytest.mark.parametrize('train_encoder', [False, True])
def test_the_decoder_learns_and_the_encoder_moves_if_asked(variables, train_encoder):
  clf = tiny.classifier()
  tx = optax.adam(0.01)
  state = TrainState(
    jnp.int32(0),
    {**variables, 'black_box': clf.params},
    tx.init(saliency.trained(variables['params'], train_encoder)),
  )
  step = saliency.rts_step(UNET, clf, tx, mean=MEAN, std=STD, train_encoder=train_encoder)
  after, seen = train(step, state, 60)
  loss = [m['loss'] for m in seen]
  assert np.mean(loss[-10:]) < np.mean(loss[:10]) - 0.1
  same = jax.tree.map(np.array_equal, after.variables['black_box'], clf.params)
  assert all(jax.tree.leaves(same))
  for part in ('params', 'batch_stats'):
    moved = {
      name: not all(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), v, variables[part][name]))
      )
      for name, v in after.variables[part].items()
    }
    assert moved.pop('encoder', train_encoder) == train_encoder
    assert all(moved.values())


# --- the interpreter ------------------------------------------------------------------------------


def decoder(variables, num_classes=tiny.CLASSES):
  return Decoder(variables, lambda v, x, y: UNET.apply(v, (x - 0.5) / 0.25, y), num_classes)


def test_the_map_depends_on_the_class_and_its_loss_on_the_encoder(variables):
  interp, clf = interpreters.rts(decoder(variables)), tiny.classifier()
  explain = jax.jit(lambda x, y: interp.explain(clf, x, y, jax.random.key(0)))
  maps = explain(X, Y)
  assert maps.shape == (4, 16, 16)
  assert float(maps.min()) >= 0
  assert float(maps.max()) <= 1
  assert float(np.abs(maps - explain(X, (Y + 1) % tiny.CLASSES)).max()) > 1e-4
  seen = interp.unroll(clf, X, Y, (), jax.random.key(0))
  np.testing.assert_array_equal(seen.maps[0], interp.explain(clf, X, Y, jax.random.key(0)))
  logits = TinyEncoder().apply({'params': variables['params']['encoder']}, (X - 0.5) / 0.25).logits
  np.testing.assert_allclose(seen.extra, 0.1 * losses.targeted_xent(logits, Y), rtol=1e-5)
  np.testing.assert_allclose(seen.logits, tiny.outputs(clf, X).logits, rtol=1e-5)


def test_a_decoder_of_other_classes_is_refused(variables):
  interp = interpreters.rts(decoder(variables, 7))
  with pytest.raises(InputError, match='the decoder knows 7 classes, the classifier 5'):
    interp.explain(tiny.classifier(), X, Y, jax.random.key(0))


# --- the file and the command ---------------------------------------------------------------------


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
  """A decoder for the scenes' net, untrained, as the command writes it."""
  module = saliency_unet.build('scene_resnet', 10, (8, 8))
  shapes = saliency_unet.variable_shapes(module)
  fill = np.random.RandomState(0)
  variables = jax.tree.map(lambda v: fill.uniform(0.1, 0.5, v.shape).astype(np.float32), shapes)
  card = dict.fromkeys(checkpoints.CARD_FIELDS) | {
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
  checkpoints.save_checkpoint(path, variables, card)
  return path, module, variables


def test_a_stored_decoder_is_the_net_that_was_stored(stored):
  path, module, variables = stored
  loaded = checkpoints.load_decoder(path, 'scene_resnet')
  assert loaded.classes == (0, 3, 4)
  assert loaded.num_classes == 10
  assert checkpoints.load_decoder(path).apply_fn is loaded.apply_fn  # nothing is traced anew
  x, y = tiny.images(2, 64), jnp.array([3, 4])
  expected = jax.jit(module.apply)(variables, (x - 0.5) / 0.25, y)
  seen = jax.jit(loaded.apply_fn)(loaded.params, x, y)
  np.testing.assert_allclose(seen.map, expected.map, atol=0.02)  # kernels are stored in float16
  np.testing.assert_allclose(seen.encoder.logits, expected.encoder.logits, rtol=0.01)


def test_decoders_that_do_not_fit_are_refused(stored, tmp_path):
  path = stored[0]
  with pytest.raises(InputError, match='trained to explain scene_resnet, not resnet18'):
    checkpoints.load_decoder(path, 'resnet18')
  with pytest.raises(InputError, match='no card of a saliency decoder'):
    checkpoints.load_decoder('scene_resnet')
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
      checkpoints.load_decoder(other)


def test_a_decoder_is_refused_with_other_weights_of_its_net(stored, tmp_path):
  tensors = checkpoints.read_tensors('scene_resnet')
  same, other = tmp_path / 'same.npz', tmp_path / 'other.npz'
  np.savez(same, **tensors)
  np.savez(other, **tensors | {'fc.bias': tensors['fc.bias'] + 1})
  path = tmp_path / 'rts.safetensors'
  path.write_bytes(stored[0].read_bytes())
  card = json.loads(stored[0].with_suffix('.json').read_text())
  known = {'black_box_digest': checkpoints.digest('scene_resnet')}
  path.with_suffix('.json').write_text(json.dumps(card | known))
  checkpoints.load_decoder(path, 'scene_resnet', same)  # the format does not matter
  with pytest.raises(InputError, match=r'scene_resnet with other weights than .*other\.npz'):
    checkpoints.load_decoder(path, 'scene_resnet', other)


def test_a_decoder_computes_in_the_dtype_asked_for(stored):
  x, y = tiny.images(2, 64), jnp.array([3, 4])
  whole, half = (checkpoints.load_decoder(stored[0], dtype=t) for t in (jnp.float32, jnp.bfloat16))
  a, b = (jax.jit(d.apply_fn)(d.params, x, y).map for d in (whole, half))
  assert a.dtype == b.dtype == jnp.float32
  assert 0 < float(jnp.abs(a - b).max()) < 0.05


def test_classes_that_the_selector_never_saw_are_refused(stored):
  interp = interpreters.build('rts', decoder=checkpoints.load_decoder(stored[0]))
  x, clf = tiny.images(2, 64), checkpoints.load_classifier('scene_resnet')
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
    patch.setattr(_train_rts, 'HELD_OUT', 25)
    patch.setattr(train_command, 'SAVE_EVERY', 3)
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
  decoder = checkpoints.load_decoder(stored, 'scene_resnet', 'scene_resnet')
  encoder = checkpoints.load_classifier('scene_resnet').params['params']
  frozen = decoder.params['params']['encoder']
  jax.tree.map(np.testing.assert_array_equal, dict(frozen), dict(encoder))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'encoder': 'vgg16'}, "unknown model 'vgg16'"),
    ({'encoder_weights': 'nowhere.npz'}, "no weights at 'nowhere.npz'"),
    ({'encoder': 'cifar_resnet20', 'encoder_weights': 'scene_resnet'}, 'as the encoder cifar'),
    ({'fake': 1.0}, '--fake is 1.0; expected 0 or more, and less than 1'),
    ({'widths': ['8']}, '--widths has 1 numbers; scene_resnet needs 2'),
    ({'widths': ['8', 'x']}, '--widths is 8,x; expected'),
    ({'loss_weights': ['1', '8', '-1', '0.3']}, '--loss_weights is 1,8,-1,0.3; expected four'),
    ({'loss_weights': ['1', '8']}, '--loss_weights is 1,8; expected four numbers from 0 on'),
    ({'loss_weights': ['0', '0', '0', '0']}, '--loss_weights is 0,0,0,0; .* not all 0'),
    ({'label_smoothing': 0.0}, '--label_smoothing 0.0: only --task classifier has it'),
    ({'image_size': 60}, 'features of 8×8 and 15×15 cells, .* a multiple of 32 px'),
    ({'num_examples': 1, 'batch_size': 1}, 'all training images are of class'),
    ({'std': ['1', '1', '0']}, '--std is 1,1,0; expected three positive numbers'),
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
  expected = checkpoints.load_classifier('scene_resnet', mean=(0.5,) * 3)
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
  clf, data = checkpoints.load_classifier('scene_resnet'), datasets.load('scenes')
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
  targets = np.array([setup.target_of(i, -1) for i in range(200)])
  assert set(targets.tolist()) == {0, 3, 4}
  assert (targets != setup.dataset.labels[:200]).all()


def test_the_attack_on_the_built_in_decoder_keeps_its_map():
  clf, data = checkpoints.load_classifier('scene_resnet'), datasets.load('scenes')
  rts = interpreters.rts(checkpoints.load_decoder('scene_rts', 'scene_resnet'))
  x, y = jnp.asarray(data.images(range(8)) / np.float32(255)), jnp.asarray(data.labels[:8])
  benign = jax.jit(rts.explain)(clf, x, y, jax.random.key(0))
  given = {'target': (y + 2) % 10, 'label': y}
  plain = api.attack(clf, rts, x, preset=presets.plain_pgd('fast'), **given)
  joint = api.attack(clf, rts, x, steps=40, **given)
  assert joint.success.all()
  apart = [float(metrics.map_mse(r.maps, benign).mean()) for r in (joint, plain)]
  assert apart[0] < 0.3 * apart[1]


def test_the_built_in_decoder_points_at_the_object():
  """On scenes that it was not trained on, and at nothing where the class is not there."""
  clf, data = checkpoints.load_classifier('scene_resnet'), datasets.load('scenes')
  rts = interpreters.rts(checkpoints.load_decoder('scene_rts', 'scene_resnet'))
  x, y = jnp.asarray(data.images(range(64)) / np.float32(255)), jnp.asarray(data.labels[:64])
  mask = jnp.asarray(np.stack([data.mask(i) for i in range(64)]))
  explain = jax.jit(rts.explain)
  shown = explain(clf, x, y, jax.random.key(0))
  absent = explain(clf, x, (y + 3) % 10, jax.random.key(0))
  assert metrics.pointing_game(shown, mask).mean() >= 0.95
  assert metrics.energy_inside(shown, mask).mean() >= 0.7
  assert absent.mean() < 0.1 * shown.mean()
