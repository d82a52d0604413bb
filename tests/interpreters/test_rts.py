"""RTS: net, losses and interpreter against the published code's numbers; its training."""

import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from conftest import PARITY
from parity.weights import numpy_weights

from adv2_jax import interpreters, losses, nets
from adv2_jax.interpreters.rts import Decoder
from adv2_jax.nets.saliency_unet import SaliencyUnet, pixel_shuffle
from adv2_jax.training import rts as saliency
from adv2_jax.training.fit import TrainBatch, TrainState
from adv2_jax.types import InputError, Outputs
from adv2_jax.weights import zoo

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
  variables = zoo.from_tensors(shapes, tensors, 'golden')
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


def test_the_judge_s_figures_where_they_are_known(monkeypatch):
  """A black box that looks for texture in the left half, which no blur and no noise keeps."""

  def clf(x):
    evidence = 40 * (jnp.abs(x[:, :, 1:8] - x[:, :, :7]).mean((1, 2, 3)) - 0.5)
    return Outputs(jnp.stack([evidence, -evidence], axis=-1), {})

  i, j = np.indices((16, 16))
  x = jnp.broadcast_to(jnp.asarray((i + j) % 2, jnp.float32)[None, ..., None], (8, 16, 16, 3))
  left = jnp.zeros((8, 16, 16)).at[:, :, :8].set(1.0)
  y = jnp.array([0, 0, 0, 0, 1, 1, 1, 1])

  def judged(mask):
    seen = types.SimpleNamespace(map=mask, exists=jnp.tile(jnp.array([0.0, 1.0]), (8, 1)))
    monkeypatch.setattr(saliency, '_apply', lambda *_, **__: seen)
    return saliency.judge(None, None, clf, x, y, jax.random.key(0), mean=(0,), std=(1,))

  shows = np.array(y == 0, np.float32)
  for mask, kept, removed in ((left, 1, 0), (1 - left, 0, 1)):
    found = judged(mask)
    np.testing.assert_allclose(found.p_kept, np.where(shows, kept, 1 - kept), atol=1e-3)
    np.testing.assert_allclose(found.p_removed, np.where(shows, removed, 1 - removed), atol=1e-3)
    np.testing.assert_allclose(found.p_whole, shows, atol=1e-3)
    np.testing.assert_array_equal(found.correct, shows == 1)
    assert found.exists.all()
  np.testing.assert_allclose(judged(left / 4).marked, 1 / 8)


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
