"""The built-in scenes: small photograph-like images whose class needs shape *and* texture.

Every scene is a pure function of (seed, split, index). Behind: a coloured gradient, 1/f noise
(the amplitude spectrum of natural images; Field 1987, doi 10.1364/JOSAA.4.002379), soft light
and a few distractors that belong to no class. In front: one object of 6–25 % of the area, one of
five shapes in one of two textures, at random place, size, rotation, colour and light. A shape
leaves two classes open and a texture five; distractors carry each without the other. The object's
exact mask comes along, so that an interpreter can be measured and not only looked at.

Everything is computed in float64 and rounded to 8 bits at the end, so that the last bit of a
platform's sine does not show.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

SIZE = 64
SHAPES = ('disc', 'square', 'triangle', 'star', 'heart')
TEXTURES = ('striped', 'spotted')
CLASS_NAMES = tuple(f'{texture} {shape}' for shape in SHAPES for texture in TEXTURES)
SPLITS = ('train', 'validation', 'test')
AREA = (0.07, 0.23)  # of the image; the rasterised mask stays inside 0.06 … 0.25

# Base colours of backgrounds: sky, sea, sand, grass, leaf, stone, bark, dusk, snow, soil.
_PALETTE = np.array(
  [
    [0.55, 0.72, 0.88],
    [0.20, 0.42, 0.52],
    [0.80, 0.70, 0.52],
    [0.42, 0.56, 0.26],
    [0.18, 0.32, 0.18],
    [0.52, 0.50, 0.48],
    [0.40, 0.28, 0.20],
    [0.62, 0.44, 0.50],
    [0.86, 0.88, 0.90],
    [0.30, 0.24, 0.22],
  ]
)
_LUMA = np.array([0.299, 0.587, 0.114])
_ROWS, _COLUMNS = (c + 0.5 for c in np.mgrid[:SIZE, :SIZE].astype(np.float64))
_FREQUENCY = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.rfftfreq(SIZE), indexing='ij')

# --- shapes: signed distance to the edge, negative inside, of points (u, v) in units of the shape


def _polygon(vertices: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  start = vertices[:, :, None, None]
  edge = np.roll(vertices, -1, axis=0)[:, :, None, None] - start
  length2 = (edge**2).sum(1)

  def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    du, dv = u - start[:, 0], v - start[:, 1]
    along = np.clip((du * edge[:, 0] + dv * edge[:, 1]) / length2, 0, 1)
    nearest = ((du - along * edge[:, 0]) ** 2 + (dv - along * edge[:, 1]) ** 2).min(0)
    # Even-odd rule: an edge is crossed when it spans the point's v on the point's right.
    spans = (dv >= 0) != (dv - edge[:, 1] >= 0)
    right = (du * edge[:, 1] < dv * edge[:, 0]) == (edge[:, 1] > 0)
    inside = np.logical_xor.reduce(spans & right, axis=0)
    return np.where(inside, -1, 1) * np.sqrt(nearest)

  return distance


def _regular(n: int, inner: float | None = None) -> np.ndarray:
  """Vertices of a regular n-gon of circumradius 1, or of an n-pointed star."""
  radius = np.ones(n) if inner is None else np.tile([1, inner], n)
  angle = 2 * math.pi * np.arange(len(radius)) / len(radius)
  return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  return np.hypot(u, v) - 1


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """The heart of two quarter-turned discs on a square's corner, about its centre of area."""
  u, v = np.abs(u), v + 0.58
  lobe = np.hypot(u - 0.25, v - 0.75) - math.sqrt(2) / 4
  foot = 0.5 * np.maximum(u + v, 0)
  body = np.sqrt(np.minimum(u**2 + (v - 1) ** 2, (u - foot) ** 2 + (v - foot) ** 2))
  return np.where(u + v > 1, lobe, body * np.sign(u - v))


def _bar(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """A capsule about four times as long as wide."""
  return np.hypot(u - np.clip(u, -1, 1), v) - 0.35


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  return np.maximum(np.hypot(u, v) - 1, 0.85 - np.hypot(u - 0.6, v))


def _pebble(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """A lobed outline that is none of the five shapes."""
  angle = np.arctan2(v, u)
  return 0.8 * (np.hypot(u, v) - (1 + 0.35 * np.cos(2 * angle) + 0.2 * np.cos(3 * angle + 1)))


_DISTANCE = {
  'disc': _disc,
  'square': _polygon(_regular(4)),
  'triangle': _polygon(_regular(3)),
  'star': _polygon(_regular(5, inner=0.5)),
  'heart': _heart,
  'bar': _bar,
  'crescent': _crescent,
  'pebble': _pebble,
}
_NO_CLASS = ('bar', 'crescent', 'pebble')


@functools.cache
def _unit_area_and_radius(name: str) -> tuple[float, float]:
  step = 1 / 128
  u, v = np.meshgrid(*[np.arange(-2, 2, step) + step / 2] * 2)
  inside = _DISTANCE[name](u, v) < 0
  return inside.sum() * step**2, np.hypot(u, v)[inside].max()


# --- textures: share of the second colour in [0,1], with edges one pixel wide


def _texture(
  rng: np.random.Generator, name: str, columns: np.ndarray, rows: np.ndarray
) -> np.ndarray:
  angle, shift = rng.random() * math.pi, rng.random(2) * 10
  p = math.cos(angle) * columns + math.sin(angle) * rows + shift[0]
  q = math.cos(angle) * rows - math.sin(angle) * columns + shift[1]
  if name == 'plain':
    return np.zeros_like(p)
  if name == 'striped':
    period, duty = rng.uniform(4.5, 7.0), rng.uniform(0.4, 0.6)
    offset = np.abs(p / period - np.round(p / period)) * period
    return np.clip(duty * period / 2 - offset + 0.5, 0, 1)
  period, duty = rng.uniform(5.0, 7.0), rng.uniform(0.28, 0.34)
  row = np.round(q / period)
  p = p + 0.5 * period * (row % 2)  # neighbouring rows of spots are staggered
  radius = np.hypot(q - row * period, p - np.round(p / period) * period)
  return np.clip(duty * period - radius + 0.5, 0, 1)


# --- painting


def _noise(rng: np.random.Generator, exponent: float, channels: int) -> np.ndarray:
  """1/f^exponent noise f64[S,S,channels] of mean 0 and deviation 1, stretched in some direction."""
  angle, stretch = rng.random() * math.pi, math.exp(rng.uniform(0, 0.5))
  fy, fx = _FREQUENCY
  along = (math.cos(angle) * fx + math.sin(angle) * fy) * stretch
  across = (math.cos(angle) * fy - math.sin(angle) * fx) / stretch
  amplitude = np.maximum(np.hypot(along, across), 0.5 / SIZE) ** -exponent
  amplitude[0, 0] = 0
  spectrum = np.fft.rfft2(rng.random((SIZE, SIZE, channels)) - 0.5, axes=(0, 1))
  noise = np.fft.irfft2(spectrum * amplitude[:, :, None], s=(SIZE, SIZE), axes=(0, 1))
  return noise / noise.std((0, 1))


def _background(rng: np.random.Generator) -> np.ndarray:
  first, second = _PALETTE[rng.permutation(len(_PALETTE))[:2]] + rng.uniform(-0.08, 0.08, (2, 3))
  angle = rng.random() * 2 * math.pi
  ramp = (math.cos(angle) * (_COLUMNS - SIZE / 2) + math.sin(angle) * (_ROWS - SIZE / 2)) / SIZE
  noise = _noise(rng, rng.uniform(1.15, 2.0), 4)
  # The two colours meet along a line that the noise makes a shore, a cloud or a ridge.
  share = 1 / (1 + np.exp(-(rng.uniform(2, 9) * ramp + rng.uniform(0.4, 1.6) * noise[..., 3])))
  image = first * share[..., None] + second * (1 - share[..., None])
  grey = rng.uniform(0.03, 0.09) * noise[..., :1]
  return image + grey + rng.uniform(0.005, 0.025) * noise[..., :3]


def _colours(rng: np.random.Generator, backdrop: np.ndarray) -> np.ndarray:
  """Two colours f64[2,3] apart from each other, in either order of brightness, and off `backdrop`.

  Of some random pairs, the one whose nearest two among (first, second, backdrop) differ most.
  """
  pairs = rng.random((12, 2, 3)) * 0.9 + 0.05
  luma = pairs @ _LUMA
  apart = np.abs(luma[:, 0] - luma[:, 1])
  off = np.linalg.norm(pairs - backdrop, axis=-1).min(-1)
  return pairs[np.argmax(np.minimum(apart, 0.6 * off) + 0.15 * rng.random(12))]


def _paint(
  rng: np.random.Generator,
  image: np.ndarray,
  shape: str,
  texture: str,
  area: float,
  centre: np.ndarray,
  light: float,
) -> np.ndarray:
  """Draws one body with its shadow onto `image`, in place.

  Args:
    rng: draws rotation, texture and colours.
    image: f64[S,S,3].
    shape: a key of `_DISTANCE`.
    texture: 'striped', 'spotted' or 'plain'.
    area: in pixels.
    centre: (column, row) in pixels.
    light: direction the light comes from, in radians.

  Returns:
    The exact mask bool[S,S]: pixel centres inside the outline.
  """
  unit_area, unit_radius = _unit_area_and_radius(shape)
  size = math.sqrt(area)
  scale = size / math.sqrt(unit_area)
  angle = rng.random() * 2 * math.pi
  drop, darkness = rng.uniform(0.12, 0.22) * size, rng.uniform(0.3, 0.55)
  softness = 0.5 + drop / 3
  # Nothing changes farther away than the shadow's tail, so work in that window only.
  reach = scale * unit_radius + drop + 5 * softness
  left, top = np.clip(np.floor(centre - reach), 0, SIZE).astype(int)
  right, bottom = np.clip(np.ceil(centre + reach), 0, SIZE).astype(int)
  window = np.s_[top:bottom, left:right]
  columns, rows, canvas = _COLUMNS[window], _ROWS[window], image[window]
  x, y = columns - centre[0], rows - centre[1]
  cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
  towards = math.cos(light), math.sin(light)

  def distance(dx: float, dy: float) -> np.ndarray:
    u, v = cos * (x + dx) + sin * (y + dy), cos * (y + dy) - sin * (x + dx)
    return scale * _DISTANCE[shape](u, v)

  shadow = distance(drop * towards[0], drop * towards[1]) / softness
  canvas *= 1 - (darkness / (1 + np.exp(np.clip(shadow, -30, 30))))[..., None]

  edge = distance(0, 0)
  inside = edge < 0
  first, second = _colours(rng, canvas.mean((0, 1)))
  share = _texture(rng, texture, columns, rows)[..., None]
  surface = first * (1 - share) + second * share
  # A rounded rim: near the edge the surface turns away, brighter on the side of the light.
  slope_y, slope_x = np.gradient(edge)
  rim = np.exp(np.minimum(edge, 0) / (0.12 * size)) * (slope_x * towards[0] + slope_y * towards[1])
  side = (x * towards[0] + y * towards[1]) / size
  shade = 1 + rng.uniform(0.1, 0.35) * side + rng.uniform(0.2, 0.45) * rim
  surface = surface * np.clip(shade, 0.3, 1.6)[..., None]
  cover = np.clip(0.5 - edge, 0, 1)[..., None]
  canvas[:] = canvas * (1 - cover) + surface * cover
  mask = np.zeros((SIZE, SIZE), bool)
  mask[window] = inside
  return mask


def _distractors(rng: np.random.Generator, image: np.ndarray, light: float) -> None:
  """One to four bodies of 1–4 % of the area that belong to no class, and perhaps a twig."""
  for _ in range(1 + int(rng.random() * 4)):
    if rng.random() < 0.5:
      shape, texture = SHAPES[int(rng.random() * len(SHAPES))], 'plain'
    else:
      shape = _NO_CLASS[int(rng.random() * len(_NO_CLASS))]
      texture = ('plain', *TEXTURES, *TEXTURES)[int(rng.random() * 5)]
    area = SIZE**2 * rng.uniform(0.01, 0.04)
    _paint(rng, image, shape, texture, area, rng.uniform(4, SIZE - 4, 2), light)
  if rng.random() < 0.4:
    start, angle = rng.uniform(0, SIZE, 2), rng.random() * math.pi
    x, y = _COLUMNS - start[0], _ROWS - start[1]
    offset = np.abs(math.cos(angle) * y - math.sin(angle) * x + 0.004 * x * y)
    cover = np.clip(rng.uniform(0.5, 1.2) - offset + 0.5, 0, 1)[..., None]
    image[:] = image * (1 - cover) + rng.uniform(0.1, 0.8, 3) * cover


def render(seed: int, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws one scene.

  Args:
    seed: of the whole data set.
    split: 'train', 'validation' or 'test'; each has its own stream of scenes.
    index: ≥ 0; the class is `index % 10`.

  Returns:
    image u8[64,64,3] and the object's mask bool[64,64].
  """
  rng = np.random.default_rng([seed, SPLITS.index(split), index])
  shape, texture = divmod(index % len(CLASS_NAMES), len(TEXTURES))
  light = rng.random() * 2 * math.pi
  image = _background(rng)
  _distractors(rng, image, light)
  area = SIZE**2 * math.exp(rng.uniform(*np.log(AREA)))
  unit_area, unit_radius = _unit_area_and_radius(SHAPES[shape])
  radius = unit_radius * math.sqrt(area / unit_area) + 1
  centre = rng.uniform(radius, SIZE - radius, 2)
  mask = _paint(rng, image, SHAPES[shape], TEXTURES[texture], area, centre, light)
  # One light over everything: gain, and a fall-off away from where it comes from.
  side = (_COLUMNS / SIZE - 0.5) * math.cos(light) + (_ROWS / SIZE - 0.5) * math.sin(light)
  image *= (rng.uniform(0.75, 1.1) * (1 + rng.uniform(0.0, 0.4) * side))[..., None]
  image += rng.uniform(0.0, 0.03) * (rng.random((SIZE, SIZE, 1)) - 0.5)  # sensor grain
  return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), mask
