"""The flags of all commands; each calls the `define_…` functions it needs, then `start`."""

import fractions
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from adv2_jax import data, interpreters, nets, validate
from adv2_jax.attacks import frameworks, goals
from adv2_jax.training import rts as saliency
from adv2_jax.types import InputError
from adv2_jax.validate import whole_number
from adv2_jax.weights import zoo
from adv2_jax.workdir import store
from experiments import _process

FLAGS = flags.FLAGS
LABEL_KEY_HELP = (
  "Array of a packed file that holds the labels; imagenette: y_imagenet for ImageNet's numbers."
)


def define_data_flags() -> None:
  """Which images and which classifier."""
  flags.DEFINE_string('dataset', 'scenes', f'One of {", ".join(data.NAMES)}.')
  flags.DEFINE_string('data_path', None, 'Folder or file of the data; tfds: its data directory.')
  flags.DEFINE_enum('labels', 'given', ['given', 'predicted'], 'predicted: what the net takes the '
                    'clean image for; the data need no labels.')  # fmt: skip
  flags.DEFINE_string('label_key', 'y', LABEL_KEY_HELP)
  flags.DEFINE_string('split', None, 'Split of scenes and tfds sets, default: the evaluation one; '
                      'of others train or held_out (the tenth that experiments.train holds out), '
                      'default: all.')  # fmt: skip
  flags.DEFINE_string('masks', None, 'Masks or boxes (.npz, .json) for localisation.')
  flags.DEFINE_integer('image_size', None, "Side in pixels; default: the model's own.")
  flags.DEFINE_bool('skip_corrupt', False, 'Leave damaged images out instead of stopping.')
  flags.DEFINE_string('model', 'scene_resnet', f'One of {", ".join(nets.ZOO)}.')
  flags.DEFINE_string(
    'weights', None, 'Built-in name, FILE.npz, FILE.safetensors, orbax directory, hf://owner/name.'
  )
  flags.DEFINE_list('mean', None, "Channel means; default: the weights' card's, else ImageNet's.")
  flags.DEFINE_list('std', None, 'Channel deviations; default likewise.')
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the computation.')


def define_example_flags() -> None:
  """Which examples, on what devices, and where the results go."""
  flags.DEFINE_integer('num_examples', 64, 'The first N that the classifier gets right.')
  flags.DEFINE_bool(
    'shuffle', False, 'Go through the data in a fixed random order: for sorted sets.'
  )
  flags.DEFINE_integer('skip_examples', 0, 'Pass over the first ones it gets right (tuned on).')
  flags.DEFINE_integer('batch_size', 16, 'Examples per device and batch.')
  flags.DEFINE_integer('seed', 0, 'Of targets and random starts; never of the data.')
  flags.DEFINE_string('workdir', None, 'Where to write; default: runs/<date-time>-<config hash>.')
  flags.DEFINE_integer('num_devices', None, 'Local devices to spread a batch over; default: all.')


def define_explain_flags() -> None:
  """What is explained, on which examples."""
  define_example_flags()
  flags.DEFINE_list(
    'interpreters',
    None,
    f'Of {", ".join(interpreters.NAMES)}; default: grad, cam, mask (an attack with --preset fast: '
    'not to go away from maps), and rts where there is a decoder. An attack also takes joint: all '
    'others at once (alone: all four that the model allows).',
  )
  flags.DEFINE_string('decoder', None, 'Weights of rts; default: the built-in ones of --model.')
  flags.DEFINE_bool('resume', False, 'Go on with the run in --workdir.')


def define_attack_flags() -> None:
  """What is attacked, and how."""
  define_explain_flags()
  flags.DEFINE_enum('framework', 'pgd', frameworks.NAMES, 'Perturbation set and optimiser.')
  flags.DEFINE_enum('norm', 'linf', frameworks.NORMS, 'Of --epsilon; l2: pgd alone.')
  flags.DEFINE_float('tau', None, "stadv: weight of the flow's roughness; default: the preset's.")
  flags.DEFINE_float('kappa', None, 'cw: confidence, in logits; default: 0.')
  flags.DEFINE_string('goal', 'deceive', 'deceive: a wrong class with the target map; map_only: '
                      'the class stays, the map goes; class_only: plain PGD.')  # fmt: skip
  flags.DEFINE_string('target_map', 'benign', 'benign, random_class, random_patch, path:A (that '
                      "share of the way from the benign map to the target class's own), FILE.npz; "
                      'with map_only also away or away_centre, from the benign one.')  # fmt: skip
  flags.DEFINE_string('target_label', None, 'random (another class; with rts, another of those '
                      'that its decoder knows; the default), least_likely, runner_up, untargeted '
                      '(any wrong class), a class, or FILE.csv.')  # fmt: skip
  flags.DEFINE_list('target_classes', None, 'Random targets are drawn among these; default: all, '
                    'or with rts those that its decoder knows.')  # fmt: skip
  flags.DEFINE_list('epsilon', None, 'Radius, in units of the image range, of pgd: a number or a '
                    'fraction such as 8/255; L∞: default 0.031. Several: all of it once for '
                    'each.')  # fmt: skip
  flags.DEFINE_enum('preset', 'fast', frameworks.PRESETS, 'Schedule: ours, the same with more '
                    'steps, the published one, or one of the literature (BUILD.md).')  # fmt: skip
  flags.DEFINE_integer('steps_s1', None, "Warm-up steps; default: the preset's.")
  flags.DEFINE_integer('steps_s2', None, "Steps on the joint loss; default: the preset's.")
  flags.DEFINE_list(
    'attacks',
    None,
    f'The rows wanted, of {", ".join(store.ATTACKS)}; default: all that apply. benign is always '
    'among them.',
  )


def define_evaluate_flags() -> None:
  """Which run is judged anew."""
  flags.DEFINE_string('workdir', None, 'The finished run.', required=True)


def define_transfer_flags() -> None:
  """Which run's images are shown to whom."""
  flags.DEFINE_string('workdir', None, 'The finished run.', required=True)
  names = ', '.join(interpreters.NAMES)
  flags.DEFINE_list('interpreters', None, f'Who looks, of {names}; default: those of the run.')
  flags.DEFINE_string('model', None, "Another classifier that looks; default: the run's.")
  flags.DEFINE_string('weights', None, 'Its weights, as in experiments.attack.')
  flags.DEFINE_string('decoder', None, 'Weights of rts; default: those of the run, or the built-in '
                      'ones of --model.')  # fmt: skip
  flags.DEFINE_list(
    'mean', None, "Its channel means; default: the weights' card's, else ImageNet's."
  )
  flags.DEFINE_list('std', None, 'Its channel deviations; default likewise.')


def define_tables_flags() -> None:
  """Which tables, of what."""
  flags.DEFINE_list('table', None, 'Some of E1, E2, E3, E4, E6, E7, speed, literature, '
                    'joint; or all.', required=True)  # fmt: skip
  flags.DEFINE_enum('scale', 'cpu', ['smoke', 'cpu', 'full'], 'How many images: a few, 256 (64 '
                    'where MASK is among the interpreters), or 2000 (500).')  # fmt: skip
  flags.DEFINE_multi_string('on', None, "Other data and nets: 'NAME [N[/M]] --dataset …', flags of "
                            'experiments.attack; N images, M where MASK is among the '
                            'interpreters. May be repeated.')  # fmt: skip
  flags.DEFINE_bool('scenes', True, 'Among the data.')
  flags.DEFINE_integer('jobs', 1, 'Runs at a time, each with a log instead of a bar: for small '
                       'ones on a CPU, which mostly trace and compile.')  # fmt: skip
  flags.DEFINE_string('workdir', None, 'Where tables and runs go; default: runs/tables-<scale>.')


def define_train_flags() -> None:
  """What is trained, on what, and where it goes."""
  flags.DEFINE_enum('task', 'classifier', ['classifier', 'rts'], 'What to train.')
  flags.DEFINE_string('dataset', 'scenes', f'One of {", ".join(data.NAMES)}.')
  flags.DEFINE_string('data_path', None, 'Folder or file of the training data.')
  flags.DEFINE_string('test_path', None, 'The same for held-out data; default: scenes draw their '
                      'test split, tfds sets use theirs, others hold out a tenth.')  # fmt: skip
  flags.DEFINE_string('label_key', 'y', LABEL_KEY_HELP)
  flags.DEFINE_integer(
    'image_size', None, 'Resize and crop to this side; default: as stored.', lower_bound=1
  )
  flags.DEFINE_integer(
    'num_examples', None, 'Train on the first N; default: all (scenes: 16000).', lower_bound=1
  )
  flags.DEFINE_string('model', 'scene_resnet', f'One of {", ".join(nets.ZOO)}.')
  flags.DEFINE_string('weights', None, 'Start from these weights; default: from random '
                      'ones. rts: those of the black box; default: the built-in ones.')  # fmt: skip
  flags.DEFINE_list('mean', None, "Channel means for normalisation; default: ImageNet's; rts: "
                    "the black box's, default: its card's.")  # fmt: skip
  flags.DEFINE_list('std', None, 'Channel deviations, likewise.')
  flags.DEFINE_string('workdir', None, 'Where to write; default: runs/train-<task>-<model>.')
  flags.DEFINE_bool('resume', False, 'Go on where the run in workdir stopped.')
  flags.DEFINE_integer('seed', 0, 'Of initial weights, order and augmentation; never of the data.')
  flags.DEFINE_integer('batch_size', 64, 'Images per step.', lower_bound=1)
  flags.DEFINE_integer('epochs', 12, 'Passes over the training data.', lower_bound=1)
  flags.DEFINE_integer('steps', None, 'Steps in all; overrides epochs.', lower_bound=1)
  flags.DEFINE_enum('optimiser', None, ['sgd', 'adamw'], 'Default: sgd (Nesterov); rts: adamw.')
  flags.DEFINE_float('learning_rate', None, 'Peak of the one-cycle; default: 0.1; rts: 0.002.')
  flags.DEFINE_float('weight_decay', 5e-4, 'On kernels only.')
  flags.DEFINE_float('label_smoothing', None, 'Share of the target spread over all classes; '
                     'default: 0.02; rts has none.')  # fmt: skip
  flags.DEFINE_string('encoder', None, 'rts: net whose features are read; default: --model.')
  flags.DEFINE_string('encoder_weights', None, 'rts: its weights; default: those of --model '
                      'if it is that net, else its built-in ones.')  # fmt: skip
  flags.DEFINE_list('encoder_mean', None, "rts: its channel means; default: the black box's if it "
                    "is the same, else its card's, else ImageNet's.")  # fmt: skip
  flags.DEFINE_list('encoder_std', None, 'rts: its channel deviations, likewise.')
  flags.DEFINE_bool('train_encoder', None, 'rts: train the encoder too.')
  flags.DEFINE_integer('selector_steps', None, 'rts: of the selector alone, first; default: an '
                       'epoch.', lower_bound=0)  # fmt: skip
  flags.DEFINE_list('widths', None, 'rts: channels of the decoder, deepest first; default: a '
                    "quarter of the encoder's, 32 at least.")  # fmt: skip
  flags.DEFINE_float('confidence', None, "rts: threshold of the selector's gate; default: 0.")
  flags.DEFINE_float('fake', None, 'rts: share of images asked for a class they do not show; '
                     'default: 0.3.')  # fmt: skip
  flags.DEFINE_bool('only_correct', None, 'rts: learn from the images that the black box gets '
                    'right; by default from all.')  # fmt: skip
  flags.DEFINE_list('loss_weights', None, 'rts: weights of destroyer, area, smoothness and '
                    'preserver in the loss; default: the published 1,8,0.5,0.3.')  # fmt: skip


def define_bench_flags() -> None:
  """What is timed."""
  flags.DEFINE_enum('model', 'resnet50', ['resnet18', 'resnet34', 'resnet50', 'resnet101'], 'Net.')
  flags.DEFINE_string('weights', None, 'As in experiments.attack; default: random ones.')
  flags.DEFINE_list('batch_sizes', ['4', '16'], 'Images per step, one table row each.')
  flags.DEFINE_list('steps', ['cam', 'grad'], 'Which attack steps: cam, grad, mask, alternation.')
  flags.DEFINE_list('looks', ['4'], 'mask, alternation: masks looked at, one table row each.')
  flags.DEFINE_integer('repeats', 5, 'Measurements of each, the sides taking turns.')
  flags.DEFINE_integer('image_size', 224, 'Side in pixels.')
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the computation.')
  flags.DEFINE_string('out', None, 'Write the figures to this JSON file.')


def config() -> dict[str, Any]:
  """The command's flags, by name."""
  flags_here = FLAGS.flags_by_module_dict()[__name__]
  found = {flag.name: flag.value for flag in sorted(flags_here, key=lambda f: f.name)}
  if found.get('target_label', '') is None and found['goal'] != 'map_only':
    found['target_label'] = 'random'
  if found.get('interpreters', ()) is None and 'dataset' in found:
    found['interpreters'] = default_interpreters(found)
  elif found.get('interpreters') == ['joint'] and 'preset' in found:
    found['interpreters'] = [*default_interpreters(found), 'joint']
  # Flows and C&W have no radius, and that of L2 depends on the images.
  if 'epsilon' in found:
    found['epsilon'] = radii(found['epsilon'])
  if (found.get('framework'), found.get('norm')) == ('pgd', 'linf') and found['epsilon'] is None:
    found['epsilon'] = frameworks.EPSILON
  if 'resume' in found and not found['workdir']:
    task = f'train-{found["task"]}-{found["model"]}' if 'task' in found else None
    found['workdir'] = f'runs/{task}' if task else str(store.default_workdir(found))
  return found


def radii(values: Sequence[str] | None) -> float | list[float] | None:
  """The number of --epsilon, or its numbers where they are several; InputError for others."""
  if values is None:
    return None
  try:
    found = [float(fractions.Fraction(v)) if '/' in v else float(v) for v in values]
  except (ValueError, ZeroDivisionError):
    found = []
  if not found:
    raise InputError(
      f'--epsilon is {",".join(values)}; expected a number or a fraction such as 0.031 or 8/255, '
      'or several with commas between them'
    )
  return found if len(found) > 1 else found[0]


def default_interpreters(c: Mapping[str, Any]) -> list[str]:
  """Those of the method, as far as they can be attacked (or, without a preset, drawn) here."""
  if c.get('preset') == 'dombrowski':
    return ['grad']
  mask = [] if _mask_is_refused(c) else ['mask']
  decoder = c['decoder'] or zoo.built_in_decoder(c['model'], c['weights'])
  return ['grad', 'cam', *mask, *(['rts'] if decoder else [])]


def _mask_is_refused(c: Mapping[str, Any]) -> bool:
  return c.get('preset') not in (None, 'authors', 'thorough') and c['target_map'] in goals.AWAY


def check(c: dict[str, Any]) -> None:
  """InputError for a number out of range or an unknown name, before anything is loaded."""
  given = c.get('epsilon')
  frameworks.check(
    c.get('framework', 'pgd'),
    c.get('norm', 'linf'),
    tau=c.get('tau'),
    kappa=c.get('kappa'),
    has_epsilon=given is not None,
  )
  several = given if isinstance(given, list) else [given] if given is not None else []
  for epsilon in several:
    if not 0 < epsilon <= (math.inf if c.get('norm') == 'l2' else 1):
      raise InputError(f'--epsilon is {epsilon}; expected 0 < epsilon ≤ 1, such as 0.031')
  if len({store.part_name(epsilon) for epsilon in several}) < len(several):
    told = ','.join(map(str, several))
    raise InputError(f'--epsilon is {told}; expected each radius once')
  for low, names in (
    (1, ('num_examples', 'batch_size', 'image_size', 'steps_s2', 'num_devices')),
    (0, ('steps_s1', 'skip_examples')),
  ):
    for name in names:
      if c.get(name) is not None and c[name] < low:
        expected = 'at least 1' if low else '0 or more'
        raise InputError(f'--{name} is {c[name]}; expected {expected}')
  if not 0 <= c['seed'] < 2**32:
    raise InputError(f'--seed is {c["seed"]}; expected 0 ≤ seed < 2³²')
  if c['model'] not in nets.ZOO:
    raise InputError(f'--model {c["model"]!r} is unknown; expected one of {", ".join(nets.ZOO)}')
  if 'goal' in c:
    check_goal(c)
  check_interpreters(parts(c['interpreters']), c.get('decoder'))
  if c.get('target_classes') is not None:
    _check_random(c)
  _check_joint(c)
  _check_attacks(c.get('attacks'))
  if refused := [n for n in ('mask', 'joint') if n in c['interpreters'] and _mask_is_refused(c)]:
    raise InputError(
      f'--target_map {c["target_map"]}: {refused[0]} under --preset {c["preset"]} comes close to '
      f'maps, and goes away from none; leave {refused[0]} out of --interpreters'
      f'{", or take --preset thorough" * (refused[0] == "mask")}'
    )
  if c['num_devices'] is not None and c['num_devices'] > jax.local_device_count():
    raise InputError(
      f'--num_devices is {c["num_devices"]}; this machine has {jax.local_device_count()}'
    )


def _check_random(c: Mapping[str, Any]) -> None:
  if c['target_label'] not in (None, 'random') or c['goal'] == 'map_only':
    label = c['target_label']
    beside = '--goal map_only' if c['goal'] == 'map_only' else f'--target_label {label}'
    raise InputError(
      f'--target_classes with {beside}: only random targets are drawn among classes; leave one of '
      'the flags out'
    )


def parts(names: Sequence[str]) -> list[str]:
  """The interpreters of a list without the joint of them."""
  return [name for name in names if name != 'joint']


def _check_joint(c: Mapping[str, Any]) -> None:
  names = c['interpreters']
  if 'joint' not in names:
    return
  given = f'--interpreters {",".join(names)}'
  if 'preset' not in c:
    raise InputError(f'{given}: joint is for attacks; its parts explain by themselves')
  if len(names) > len(set(names)) or len(parts(names)) < 2:
    raise InputError(
      f'{given}: joint attacks two interpreters or more at once: name them, or give joint alone '
      'for all that the model allows'
    )
  if c['preset'] == 'authors':
    raise InputError(
      f'{given}: --preset authors has no joint attack, nobody published one; take --preset fast'
    )
  if c['goal'] == 'class_only':
    raise InputError(
      f'{given}: --goal class_only looks at no map, so there is nothing to join; leave joint out'
    )
  if c['framework'] != 'pgd':
    raise InputError(
      f'{given}: --framework {c["framework"]} has no joint attack so far; take --framework pgd'
    )


def _check_attacks(names: Sequence[str] | None) -> None:
  unknown = [name for name in names or () if name not in store.ATTACKS]
  if names is not None and (unknown or not names):
    raise InputError(f'--attacks is {",".join(names)}; expected some of {", ".join(store.ATTACKS)}')


def check_goal(c: Mapping[str, Any]) -> None:
  """InputError for an unknown goal, or one that does not go with the targets."""
  goal, kind = c['goal'], c['target_map']
  if goal not in goals.NAMES:
    raise InputError(f'--goal is {goal!r}; expected one of {", ".join(goals.NAMES)}')
  path_share(kind)
  if goal != 'map_only':
    if kind in goals.AWAY:
      raise InputError(
        f'--target_map {kind} needs --goal map_only: there the benign map is to be left, here one '
        'is to be reached'
      )
    return
  if c['target_label'] is not None:
    raise InputError(
      f'--target_label {c["target_label"]}: with --goal map_only the class stays the true one; '
      'leave the flag out'
    )
  if kind == 'benign' or path_share(kind) is not None:
    raise InputError(
      f'--goal map_only with --target_map {kind}: the map is there already; take away, '
      'away_centre, random_class, random_patch or FILE.npz'
    )


def path_share(kind: str) -> float | None:
  """α of `--target_map path:α`; None for others. InputError unless 0 ≤ α ≤ 1."""
  if not kind.startswith('path:'):
    return None
  try:
    share = float(kind.removeprefix('path:'))
  except ValueError:
    share = math.nan
  if not 0 <= share <= 1:
    raise InputError(
      f'--target_map is {kind}; expected path:A with A from 0 (the benign map) to 1 (the map of '
      'the target class), such as path:0.5'
    )
  return share


def check_interpreters(names: Sequence[str], decoder: str | None) -> None:
  """InputError for names that are none or not distinct, or a decoder without rts."""
  if not names or len(set(names)) < len(names):
    raise InputError(f'--interpreters is {names}; expected one or more distinct names')
  for name in names:
    if name not in interpreters.NAMES:
      raise InputError(
        f'interpreter {name!r} is unknown; expected one of {", ".join(interpreters.NAMES)}; an '
        'attack takes joint, too'
      )
  if decoder is not None and 'rts' not in names:
    raise InputError(f'--decoder {decoder}: only rts has one; add it to --interpreters')


def start(main: Callable[[dict[str, Any]], Any]) -> None:
  """Runs a command on its `config`.

  `--help` lists the flags and exits 0; bad input ends with one line on stderr and exit code 1, an
  interruption with one that says how to go on and 130.
  """
  _process.guard_output()
  flags.DEFINE_string(
    'compilation_cache',
    None,
    'Where compiled programs are kept for the next time; empty: nowhere. Default: '
    f'${_process.CACHE_VARIABLE}, else adv2_jax in the cache directory of the user.',
  )
  for flag in FLAGS.flags_by_module_dict()[__name__]:
    FLAGS.register_key_flag_for_module(sys.argv[0], flag)

  def parse(argv: list[str]) -> list[str]:
    try:
      return FLAGS(argv)
    except flags.Error as error:
      sys.exit(' '.join(str(error).split()))
    except SystemExit:  # absl leaves with 1 after it has helped
      sys.exit(0)

  def command(argv: list[str]) -> None:
    # absl makes all loggers speak up; that there is no TPU would look like an error.
    logging.getLogger('jax._src.xla_bridge').setLevel(logging.WARNING)
    if len(argv) > 1:
      sys.exit(f'unexpected argument {argv[1]!r}')
    _process.keep_compiled(FLAGS.compilation_cache)
    c: dict[str, Any] = {}
    try:
      c = config()
      main(c)
    except InputError as error:
      sys.exit(str(error))
    except KeyboardInterrupt:
      resumable = 'resume' in c and c['workdir']
      how = f'go on with --resume --workdir={c["workdir"]}' if resumable else 'start it again'
      print(f'\ninterrupted; {how}', file=sys.stderr)
      sys.exit(130)
    finally:
      sys.stdout.flush()

  app.run(command, flags_parser=parse)


def floats(values: list[str] | None, name: str) -> tuple[float, ...] | None:
  """The three numbers of --mean or --std; None where the flag is not given."""
  if values is None:
    return None
  return validate.per_channel(f'--{name}', values, 3, std=name.endswith('std'))


def target_classes(values: list[str] | None, num_classes: int) -> tuple[int, ...] | None:
  """The classes of --target_classes, sorted; None where the flag is not given."""
  if values is None:
    return None
  found = tuple(sorted({-1 if (n := whole_number(v)) is None else n for v in values}))
  if not 1 < len(found) == len(values) or not 0 <= found[0] <= found[-1] < num_classes:
    raise InputError(
      f'--target_classes is {",".join(values)}; expected two classes or more of 0…'
      f'{num_classes - 1}, each once'
    )
  return found


def loss_weights(values: list[str] | None) -> saliency.Weights:
  """The four numbers of --loss_weights; the published ones where the flag is not given."""
  if values is None:
    return saliency.PUBLISHED
  try:
    numbers = tuple(float(v) for v in values)
  except ValueError:
    numbers = ()
  if len(numbers) != 4 or not all(0 <= v < math.inf for v in numbers) or not any(numbers):
    raise InputError(
      f'--loss_weights is {",".join(values)}; expected four numbers from 0 on, not all 0: those of '
      'destroyer, area, smoothness and preserver, such as 1,8,0.5,0.3'
    )
  return saliency.Weights(*numbers)


def widths(values: list[str] | None) -> list[int] | None:
  """The channels of --widths; None where the flag is not given."""
  if values is None:
    return None
  numbers = [whole_number(v) or 0 for v in values]
  if not all(n >= 4 for n in numbers):
    raise InputError(
      f'--widths is {",".join(values)}; expected channels from 4 on, such as 256,128,64'
    )
  return numbers
