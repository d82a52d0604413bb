import csv
import json
import os
import shutil

import numpy as np
import pytest
from conftest import shared_data

from adv2_jax import data, images
from adv2_jax.data import sources
from adv2_jax.data.masks import read_masks
from adv2_jax.types import InputError
from experiments.train import open_data


def pictures(n: int, size: int = 12) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
  """Six PNGs in the sub-folders ant and bee; the picture number is the data set's id."""
  root = tmp_path / 'images'
  for i, image in enumerate(pictures(6)):
    images.write_png(root / ('ant' if i < 3 else 'bee') / f'{i}.png', image)
  return root


def write_packed(path, n=5, **arrays):
  files = [images.encode_png(image) for image in pictures(n)]
  whole = {
    'blob': np.frombuffer(b''.join(files), np.uint8),
    'offsets': np.cumsum([0, *map(len, files)]),
    'y': np.arange(n) % 3,
  }
  np.savez(path, **{k: v for k, v in {**whole, **arrays}.items() if v is not None})
  return path


def write_npz(path, **arrays):
  np.savez(path, **{'image': pictures(4), 'label': np.array([0, 2, 1, 2]), **arrays})
  return path


# --- what is read ---------------------------------------------------------------------------------


def test_folder_of_class_folders(folder):
  (folder / '.hidden').mkdir()
  (folder / 'ant' / 'notes.txt').write_text('not an image')
  dataset = data.load('folder', folder)
  assert dataset.class_names == ('ant', 'bee')
  np.testing.assert_array_equal(dataset.labels, [0, 0, 0, 1, 1, 1])
  assert dataset.labels.dtype == np.int32
  np.testing.assert_array_equal(dataset.images(dataset.ids), pictures(6))
  assert dataset.mask(0) is None
  assert 'bee' in dataset.describe(4)


@pytest.mark.parametrize(
  ('labels', 'expected', 'names'),
  [
    (['2', '0', '2'], [2, 0, 2], None),
    (['2.0', '10.0', '2'], [2, 10, 2], None),
    (['cat', 'ant', 'cat'], [1, 0, 1], ('ant', 'cat')),
    (['cat', '2', 'ant'], [2, 0, 1], ('2', 'ant', 'cat')),
  ],
)
def test_folder_with_labels_csv(folder, labels, expected, names):
  with (folder / 'labels.csv').open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['file', 'label'])
    writer.writerows(zip(['bee/4.png', 'ant/0.png', 'bee/3.png'], labels, strict=True))
  dataset = data.load('folder', folder)
  np.testing.assert_array_equal(dataset.labels, expected)
  assert dataset.class_names == names
  np.testing.assert_array_equal(dataset.images([0, 1, 2]), pictures(6)[[4, 0, 3]])


def test_class_folders_that_are_numbers_are_these_classes(tmp_path):
  """In the order of texts '10' would be class 2."""
  for name in ('0', '2', '10'):
    images.write_png(tmp_path / name / 'a.png', pictures(1)[0])
  dataset = data.load('folder', tmp_path)
  assert sorted(dataset.labels) == [0, 2, 10]
  assert dataset.file(list(dataset.labels).index(10)) == '10/a.png'
  assert dataset.numbered_for(1000, ['some', 'names', *map(str, range(998))]) is dataset
  assert dataset.numbered_for(11).num_classes == 11
  (tmp_path / 'other').mkdir()
  images.write_png(tmp_path / 'other' / 'a.png', pictures(1)[0])
  with pytest.raises(InputError, match=r"class 'other' of .* is no number, as 3 others are"):
    data.load('folder', tmp_path)


def test_hidden_and_system_entries_are_passed_over(folder):
  """What macOS, Windows and network drives leave behind is no class, no image, and no example."""
  whole = data.load('folder', folder)
  for name in ('__MACOSX/ant/._0.png', 'ant/._0.png', 'ant/Thumbs.db', 'bee/.hid/a.png', '.a.png'):
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(b'junk')
  dataset = data.load('folder', folder)
  assert [dataset.file(i) for i in dataset.ids] == [whole.file(i) for i in whole.ids]
  assert dataset.digest() == whole.digest()
  assert dataset.class_names == ('ant', 'bee')
  assert dataset.omitted == {}
  lines = ['ant/._0.png,x', 'bee/4.png,7', '__MACOSX/ant/0.png,', 'Thumbs.db,1']
  (folder / 'labels.csv').write_text('\n'.join(['file,label', *lines]))
  dataset = data.load('folder', folder)
  assert (dataset.file(0), dataset.labels.tolist()) == ('bee/4.png', [7])
  assert len(dataset.omitted['hidden or of the system']) == 3


def test_what_is_left_out_of_a_folder_is_said(folder):
  images.write_png(folder / 'top.png', pictures(1)[0])
  images.write_png(folder / 'bee' / 'more' / 'still' / 'a.png', pictures(1)[0])
  for n in range(4):
    (folder / 'ant' / f'{n}.heic').write_bytes(b'')
  (folder / 'ant' / '0.png').rename(folder / 'ant' / '0.GIF')  # by its name alone
  dataset = data.load('folder', folder)
  assert len(dataset) == 6
  assert dataset.omitted == {
    'in no image format that is read': tuple(f'ant/{n}.heic' for n in range(4)),
    'in folders within class folders': ('bee/more/still/a.png',),
    'beside the class folders': ('top.png',),
  }
  assert data.omissions(dataset.omitted) == (
    'left out of the data: 4 in no image format that is read (ant/0.heic, ant/1.heic, ant/2.heic, '
    '…); 1 in folders within class folders (bee/more/still/a.png); '
    '1 beside the class folders (top.png)'
  )


def test_training_says_what_it_leaves_out(folder, capsys):
  (folder / 'bee' / '5.png').rename(folder / 'bee' / '5.heic')
  config = {'dataset': 'folder', 'data_path': folder, 'label_key': 'y', 'image_size': None}
  open_data(config | {'num_examples': None, 'test_path': None})
  expected = 'left out of the data: 1 in no image format that is read (bee/5.heic)\n'
  assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    (['ant/0.png', 'cat/'], 'class folder .*cat has no images; fill it or remove it'),
    (['ant/0.png', 'cat/x.txt'], 'class folder .*cat has no images; fill it or remove it'),
    (
      ['ant/0.png', 'cat/x/0.png'],
      r'cat has only deeper images such as cat/x/0\.png: move them up',
    ),
    (['train/ant/0.png'], 'images in folders within folders only, such as train/ant/0.png'),
    (['0.png', '1.png', 'x.txt'], 'has 2 images but no labels: expected one .*--labels predicted'),
    (['x.txt', 'cat/x.txt'], r'has no images \(\.png .*\): expected one sub-folder'),
  ],
)
def test_folders_that_give_no_labels(tmp_path, files, message):
  """An empty folder would be a class, and all labels after it be shifted."""
  for name in files:
    path = tmp_path / name
    (path if name.endswith('/') else path.parent).mkdir(parents=True, exist_ok=True)
    if path.suffix:
      images.write_png(path, pictures(1)[0])
  with pytest.raises(InputError, match=message) as error:
    data.load('folder', tmp_path)
  assert '\n' not in str(error.value)


def test_data_without_labels(folder, tmp_path):
  flat = shutil.copytree(folder / 'ant', tmp_path / 'flat')
  np.savez(tmp_path / 'a.npz', image=pictures(3))
  packed = write_packed(tmp_path / 'b.npz', n=3, y=None)
  (folder / 'empty').mkdir()
  sets = [('folder', flat), ('folder', folder), ('npz', tmp_path / 'a.npz'), ('packed', packed)]
  for name, path in sets:
    dataset = data.load(name, path, is_labelled=False, split='train').numbered_for(1000)
    assert (dataset.labels == -1).all()
    np.testing.assert_array_equal(dataset.images([0, 2]), pictures(3)[[0, 2]])
    assert (dataset.num_classes, dataset.class_names) == (1000, None)
  (flat / 'labels.csv').write_text('file\n2.png\n')
  assert data.load('folder', flat, is_labelled=False).file(0) == '2.png'
  scenes = data.load('scenes', is_labelled=False)
  assert scenes.labels.max() == -1
  assert scenes.digest() != data.load('scenes').digest()


def test_names_that_are_not_utf_8_can_be_written(tmp_path):
  (tmp_path / os.fsdecode(b'k\xe4fer')).mkdir()
  images.write_png(tmp_path / os.fsdecode(b'k\xe4fer') / 'a.png', pictures(1)[0])
  dataset = data.load('folder', tmp_path)
  assert (dataset.file(0).encode(), dataset.class_names) == ('k�fer/a.png'.encode(), ('k�fer',))
  np.testing.assert_array_equal(dataset.image(0), pictures(1)[0])


def test_names_of_classes_in_files(tmp_path):
  """Numbers are no names, whatever their order; bytes are text."""
  numbers = write_npz(tmp_path / 'a.npz', classes=np.array(['7', '5', '6']))
  dataset = data.load('npz', numbers)
  np.testing.assert_array_equal(dataset.labels, [7, 6, 5, 6])
  assert (dataset.class_names, dataset.num_classes) == (None, 8)
  names = write_npz(tmp_path / 'a.npz', classes=np.array([b'x', b'y', b'z']))
  assert data.load('npz', names).class_names == ('x', 'y', 'z')


def test_paths_with_a_tilde(folder, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  np.savez(tmp_path / 'm.npz', mask=np.ones((6, 12, 12), bool))
  assert data.load('folder', '~/images', masks='~/m.npz').mask(5).all()
  with pytest.raises(InputError, match=f"data_dir='{tmp_path}/none'"):
    data.load('cifar10', '~/none')


@pytest.mark.parametrize('ids', [[-1], range(5, 7), [0.0], [True], [], 3, [[0]], np.array([6])])
@pytest.mark.parametrize('name', ['scenes', 'npz'])
def test_ids_are_those_of_the_set(tmp_path, name, ids):
  """Not images out of nowhere, counted from the end, or the errors of others."""
  path = tmp_path / 'a.npz'
  np.savez(path, image=pictures(6), label=np.arange(6))
  dataset = data.scenes(n=6) if name == 'scenes' else data.load('npz', path)
  with pytest.raises(InputError, match=r'its ids are 0…5|expected whole numbers, such as range'):
    dataset.images(ids)
  for ask in (dataset.image, dataset.mask, dataset.file):
    with pytest.raises(InputError, match='has no example -1'):
      ask(-1)
  with pytest.raises(InputError, match='has no example 6'):
    dataset.check([0, 6])


def test_npz(tmp_path):
  dataset = data.load('npz', write_npz(tmp_path / 'a.npz'))
  np.testing.assert_array_equal(dataset.labels, [0, 2, 1, 2])
  np.testing.assert_array_equal(dataset.images([3, 1]), pictures(4)[[3, 1]])
  assert dataset.num_classes == 3


def test_packed_and_its_label_keys(tmp_path):
  path = write_packed(tmp_path / 'a.npz', y_fine=np.arange(5) + 90, names=np.array(list('xyz')))
  dataset = data.load('packed', path)
  np.testing.assert_array_equal(dataset.labels, [0, 1, 2, 0, 1])
  np.testing.assert_array_equal(dataset.images(range(5)), pictures(5))
  assert dataset.class_names == ('x', 'y', 'z')
  fine = data.load('packed', path, label_key='y_fine')
  np.testing.assert_array_equal(fine.labels, np.arange(90, 95))
  assert fine.class_names is None


def test_the_held_out_tenth_is_what_training_leaves_out(tmp_path):
  path = write_packed(tmp_path / 'a.npz', n=40)
  train, held_out = (data.load('packed', path, split=s) for s in ('train', 'held_out'))
  assert sorted([*train.ids, *held_out.ids]) == list(range(40))
  assert len(held_out.ids) == 4
  assert not set(held_out.ids) <= set(range(36, 40))  # the set may be sorted by class
  np.testing.assert_array_equal(held_out.labels, train.labels)  # ids are those of the file
  config = {'dataset': 'packed', 'data_path': path, 'label_key': 'y', 'image_size': None}
  config |= {'num_examples': 7, 'test_path': None}
  trained_on, judged_on = open_data(config)
  np.testing.assert_array_equal(trained_on.ids, train.ids[:7])
  np.testing.assert_array_equal(judged_on.ids, held_out.ids)


def test_images_are_resized_only_when_of_another_size(folder):
  np.testing.assert_array_equal(data.load('folder', folder, image_size=12).image(2), pictures(6)[2])
  assert data.load('folder', folder, image_size=8).images([0, 5]).shape == (2, 8, 8, 3)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Tiny sets in CIFAR-10's and Imagenette's place, prepared by tfds in a random-access format."""
  tfds = pytest.importorskip('tensorflow_datasets')
  pytest.importorskip('array_record')
  from tensorflow_datasets.core import registered

  with registered.skip_registration():

    class Cifar10(tfds.core.GeneratorBasedBuilder):
      pkg_dir_path = None
      VERSION = tfds.core.Version('3.0.2')
      split = 'test'

      def _info(self):
        names = [f'class {i}' for i in range(10)]
        return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict(
            {
              'image': tfds.features.Image(shape=(12, 12, 3)),
              'label': tfds.features.ClassLabel(names=names),
            }
          ),
          disable_shuffling=True,
        )

      def _split_generators(self, dl_manager):
        return {self.split: self._generate_examples()}

      def _generate_examples(self):
        for i, image in enumerate(pictures(5)):
          yield i, {'image': images.encode_png(image), 'label': 9 - i}

    class Imagenette(Cifar10):
      VERSION = None
      BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='full-size-v2', version='1.0.0')]  # noqa: RUF012
      split = 'validation'

  root = tmp_path_factory.mktemp('tfds')
  for builder in (Cifar10, Imagenette):
    builder(data_dir=root, file_format='array_record').download_and_prepare()
  return root


def test_prepared_tfds_set_is_read_without_tensorflow(prepared):
  import sys

  dataset = data.load('cifar10', prepared)
  assert 'tensorflow' not in sys.modules
  np.testing.assert_array_equal(dataset.labels, [9, 8, 7, 6, 5])
  np.testing.assert_array_equal(dataset.images(range(5)), pictures(5))
  assert dataset.class_names[2] == 'class 2'
  with pytest.raises(InputError, match="no split 'train'; it has: test"):
    data.load('cifar10', prepared, split='train')


def test_imagenette_s_classes_among_imagenet_s(prepared):
  own, wide = (data.load('imagenette', prepared, label_key=key) for key in ('y', 'y_imagenet'))
  np.testing.assert_array_equal(own.labels, [9, 8, 7, 6, 5])
  np.testing.assert_array_equal(wide.labels, [701, 574, 571, 569, 566])
  assert (own.num_classes, wide.num_classes) == (10, 1000)
  assert wide.class_names is None


def test_unprepared_tfds_set_says_how_to_prepare_it(tmp_path):
  with pytest.raises(InputError, match='download_and_prepare') as error:
    data.load('imagenette', tmp_path)
  assert 'imagenette/full-size-v2' in str(error.value)
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)


# --- what a data set is known by ------------------------------------------------------------------


def relabel(folder):
  (folder / 'bee' / '5.png').rename(folder / 'ant' / '5.png')


@pytest.mark.parametrize('small', [True, False])
@pytest.mark.parametrize(
  'change',
  [
    lambda folder: (folder / 'ant' / '1.png').unlink(),
    lambda folder: (folder / 'ant' / '1.png').rename(folder / 'ant' / '2.png'),
    lambda folder: images.write_png(folder / 'ant' / '2.png', pictures(3)[2] ^ 1),
    relabel,
  ],
)
def test_the_digest_of_a_folder_tells_every_change(folder, tmp_path, monkeypatch, small, change):
  """A deleted, renamed, replaced or relabelled image would mix two runs' results under --resume."""
  monkeypatch.setattr(sources, 'CHECK_ALL_UP_TO', 1000 if small else 2)
  before = data.load('folder', folder).digest()
  copy = shutil.copytree(folder, tmp_path / 'elsewhere')
  assert data.load('folder', copy).digest() == before
  assert data.load('folder', folder, split='train').digest() != before
  assert data.load('folder', folder, image_size=8).digest() != before
  change(folder)
  os.utime(folder / 'ant' / '2.png', (0, 0))
  assert data.load('folder', folder).digest() != before


def test_the_digests_of_arrays_masks_and_scenes(tmp_path):
  image, label, mask = pictures(4), np.arange(4), np.ones((4, 12, 12), bool)

  def npz(image, label, mask):
    np.savez(tmp_path / 'm.npz', mask=mask)
    path = write_npz(tmp_path / 'a.npz', image=image, label=label)
    return data.load('npz', path, masks=tmp_path / 'm.npz').digest()

  other = mask.copy()
  other[0, 0] = False
  found = [npz(image, label, mask), npz(image, label, mask), npz(image ^ 1, label, mask)]
  found += [npz(image, label[::-1], mask), npz(image, label, other)]
  found += [data.load('packed', write_packed(tmp_path / f'{n}.npz', n)).digest() for n in (4, 5)]
  found += [data.scenes(*of).digest() for of in (('test', 9), ('test', 8), ('train', 9))]
  found.append(data.scenes('test', 9, seed=1).digest())
  assert len(set(found)) == len(found) - 1
  assert found[0] == found[1]


def test_a_set_names_its_files(folder, tmp_path):
  assert data.load('folder', folder).file(3) == 'bee/3.png'
  (folder / 'labels.csv').write_text('file,label\nant/2.png,0\n')
  assert data.load('folder', folder).file(0) == 'ant/2.png'
  assert data.load('npz', write_npz(tmp_path / 'a.npz')).file(0) == ''


# --- masks ----------------------------------------------------------------------------------------


def test_masks_from_bits_follow_the_image_through_resize_and_crop(tmp_path):
  mask = np.zeros((5, 12, 12), bool)
  mask[:4, 2:7, 3:9] = True
  np.savez(tmp_path / 'bool.npz', mask=mask)
  packed = np.packbits(mask.reshape(5, -1), axis=1)
  np.savez(tmp_path / 'bits.npz', packed=packed, shape=np.array([12, 12]))
  path = write_packed(tmp_path / 'a.npz')
  for name in ('bool.npz', 'bits.npz'):
    dataset = data.load('packed', path, masks=tmp_path / name)
    np.testing.assert_array_equal(dataset.mask(1), mask[1])
    assert dataset.mask(4) is None
    small = data.load('packed', path, masks=tmp_path / name, image_size=7)
    expected = images.resize_crop(mask[1], 7, nearest=True)
    np.testing.assert_array_equal(small.mask(1), expected)
    assert 0 < expected.sum() < 30


def test_boxes_in_the_frame_of_the_224_crop(tmp_path):
  boxes = [
    [[10, 20, 30, 50]],
    [[5, 5, 5, 9]],
    [[0, 0, 2, 224], [222.6, 0, 224, 3]],
    [[9, 9, 3, 20]],
  ]
  (tmp_path / 'b.json').write_text(json.dumps({'boxes_crop224_xyxy': boxes}))
  image = pictures(4, 260)
  path = write_npz(tmp_path / 'a.npz', image=image)
  dataset = data.load('npz', path, masks=tmp_path / 'b.json', image_size=224)
  expected = np.zeros((224, 224), bool)
  expected[20:50, 10:30] = True
  np.testing.assert_array_equal(dataset.mask(0), expected)
  assert dataset.mask(1) is None
  assert dataset.mask(3) is None
  assert dataset.mask(2).sum() == 2 * 224 + 1 * 3
  with pytest.raises(InputError, match=r'224×224 pixels.*image_size'):
    data.load('npz', path, masks=tmp_path / 'b.json', image_size=112)


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    ({'mask': np.ones((4, 12, 12), bool)}, 'covers 4 examples, the data set has 5'),
    ({'mask': np.ones((5, 12, 12))}, 'expected bool'),
    ({'masks': np.ones((5, 12, 12), bool)}, 'expected mask, or packed and shape'),
    ({'packed': np.ones((5, 17), np.uint8), 'shape': np.array([12, 12])}, r'uint8 \[N,18\]'),
  ],
)
def test_bad_mask_files(tmp_path, arrays, message):
  np.savez(tmp_path / 'm.npz', **arrays)
  with pytest.raises(InputError, match=message):
    read_masks(tmp_path / 'm.npz', 5)
  with pytest.raises(InputError, match='does not exist'):
    read_masks(tmp_path / 'absent.npz', 5)
  (tmp_path / 'm.json').write_text('{"boxes": []}')
  with pytest.raises(InputError, match='expected JSON with boxes_crop224_xyxy'):
    read_masks(tmp_path / 'm.json', 5)


# --- bad input: one line, before any work ---------------------------------------------------------


def test_a_corrupt_image_stops_the_run_and_is_named(folder):
  (folder / 'ant' / '1.png').write_bytes((folder / 'ant' / '1.png').read_bytes()[:90])
  with pytest.raises(InputError, match=r'ant/1\.png cannot be decoded') as error:
    data.load('folder', folder)
  assert '\n' not in str(error.value)


def test_a_corrupt_image_can_be_skipped_and_ids_stay(folder):
  (folder / 'ant' / '1.png').write_bytes(b'')
  dataset = data.load('folder', folder, skip_corrupt=True)
  np.testing.assert_array_equal(dataset.ids, [0, 2, 3, 4, 5])
  assert dataset.damaged == {1}
  assert len(dataset) == 6
  np.testing.assert_array_equal(dataset.images(dataset.ids), pictures(6)[dataset.ids])


def test_nothing_left_after_skipping(folder):
  for path in folder.glob('*/*.png'):
    path.write_bytes(b'')
  with pytest.raises(InputError, match='no readable image'):
    data.load('folder', folder, skip_corrupt=True)


def test_large_sets_are_checked_where_asked(folder, monkeypatch):
  monkeypatch.setattr(data, 'CHECK_ALL_UP_TO', 5)
  (folder / 'bee' / '4.png').write_bytes(b'')
  dataset = data.load('folder', folder)
  assert len(dataset.check([0, 1]).ids) == 6
  with pytest.raises(InputError, match=r'4\.png'):
    dataset.check([3, 4])


def test_unequal_sizes_ask_for_image_size(folder):
  images.write_png(folder / 'bee' / '4.png', np.zeros((9, 12, 3), np.uint8))
  with pytest.raises(InputError, match=r'4\.png is 9×12 pixels.*--image_size'):
    data.load('folder', folder)
  assert len(data.load('folder', folder, image_size=8)) == 6


FLOATS = pictures(4).astype(np.float32)


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    ({'image': FLOATS}, 'is float32 from 0 to 255: expected uint8'),
    ({'image': FLOATS / 255}, 'is float32 from 0 to 1: expected uint8'),
    ({'image': np.where(FLOATS > 200, np.nan, FLOATS)}, 'is NaN: expected uint8'),
    ({'image': pictures(4)[..., 0]}, r'shape \[4, 12, 12\]: expected \[N,H,W,3\]'),
    ({'image': pictures(4)[0]}, r'shape \[12, 12, 3\]'),
    ({'image': np.zeros((0, 4, 4, 3), np.uint8), 'label': np.zeros(0, int)}, 'is empty'),
    ({'label': np.array([0, 1, -1, 2])}, 'label -1 of example 2'),
    ({'label': np.array([0, 1, 2])}, r'shape \[3\] for 4 images'),
    ({'label': np.array([0.0, 1, 2, 3])}, 'expected integers'),
  ],
)
def test_bad_npz(tmp_path, arrays, message):
  with pytest.raises(InputError, match=message):
    data.load('npz', write_npz(tmp_path / 'a.npz', **arrays))


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    ({'blob': None}, "no array 'blob'; it has: offsets, y"),
    ({'offsets': np.array([0, 10, 5, 20, 30, 40])}, 'do not rise'),
    ({'offsets': np.array([0, 10, 20, 30, 40, 10**6])}, 'do not rise'),
    ({'offsets': np.linspace(0, 40, 6)}, 'expected integers'),
    ({'blob': np.zeros(4, np.float32)}, 'expected uint8'),
    ({'y': np.arange(4)}, r'shape \[4\] for 5 images'),
    ({'offsets': np.array([0, 10, 20, 30, 40, 50])}, r'image 0 of .*a\.npz cannot be decoded'),
  ],
)
def test_bad_packed(tmp_path, arrays, message):
  with pytest.raises(InputError, match=message):
    data.load('packed', write_packed(tmp_path / 'a.npz', **arrays))


def test_unknown_label_key_lists_those_there_are(tmp_path):
  path = write_packed(tmp_path / 'a.npz', y_imagenet=np.arange(5))
  with pytest.raises(InputError, match=r"no array 'fine'; it has: .*y, y_imagenet"):
    data.load('packed', path, label_key='fine')


@pytest.mark.parametrize('kind', ['npz', 'packed'])
def test_pickles_halves_and_other_files_are_refused(tmp_path, kind):
  path = tmp_path / 'a.npz'
  np.savez(path, image=np.array([{'a': 1}], dtype=object), label=np.zeros(1, int))
  with pytest.raises(InputError, match='pickled'):
    data.load(kind, path)
  write_packed(path)
  path.write_bytes(path.read_bytes()[:500])
  with pytest.raises(InputError, match=r'a\.npz is not a readable \.npz'):
    data.load(kind, path)
  path.write_bytes(b'\x80\x04nonsense')
  with pytest.raises(InputError, match='not a readable'):
    data.load(kind, path)


def test_missing_paths_and_names(tmp_path, folder):
  with pytest.raises(InputError, match=r"'imagenet'; expected one of scenes, cifar10.*packed"):
    data.load('imagenet')
  with pytest.raises(InputError, match='needs --data_path'):
    data.load('folder')
  with pytest.raises(InputError, match='absent does not exist'):
    data.load('folder', tmp_path / 'absent')
  with pytest.raises(InputError, match='not a folder'):
    data.load('folder', folder / 'ant' / '0.png')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(InputError, match='has no images'):
    data.load('folder', tmp_path / 'empty')
  with pytest.raises(InputError, match='no splits but train and held_out'):
    data.load('folder', folder, split='test')
  with pytest.raises(InputError, match='only packed'):
    data.load('folder', folder, label_key='y_imagenet')
  with pytest.raises(InputError, match='imagenette has y_imagenet'):
    data.load('imagenette', label_key='y_fine')
  with pytest.raises(InputError, match='image_size 0'):
    data.load('folder', folder, image_size=0)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('name,class\na.png,1\n', 'expected the columns file,label'),
    ('file,label\n', 'lists no images'),
    ('file,label\nant/0.png,1\nant/9.png,1\n', r'line 3: .*9\.png does not exist'),
    ('file,label\nant/0.png,\n', 'line 2: .*has no label'),
    ('file,label\nant/0.png,-3\n', 'label -3 of example 0'),
    ('file,label\nant/0.png,4294967297\n', 'label 4294967297 of example 0 .* outside 0…2147483647'),
    ('file,label\nant/0.png,1\nant/1.png,²\n', "class '²' of .* is no number, as 1 others"),
    ('file,label\nant/0.png,1\nant/1.png,--1\n', "class '--1' of .* is no number, as 1 others"),
    ('label,file\n3\n', 'line 2: .* does not exist'),
  ],
)
def test_bad_labels_csv(folder, text, message):
  (folder / 'labels.csv').write_text(text)
  with pytest.raises(InputError, match=message):
    data.load('folder', folder)


def test_a_labels_csv_as_spreadsheets_write_it(folder):
  text = ' label, what , file\n 3, "a, b" , bee/4.png \n4,,bee/5.png\n'
  (folder / 'labels.csv').write_text(text, encoding='utf-8-sig')
  dataset = data.load('folder', folder)
  assert (dataset.labels.tolist(), dataset.file(0)) == ([3, 4], 'bee/4.png')


def test_a_labels_csv_in_another_encoding_is_named(folder):
  (folder / 'labels.csv').write_bytes('file,label\nbee/4.png,Käfer\n'.encode('latin-1'))
  with pytest.raises(InputError, match=r'labels\.csv is not a CSV file in UTF-8') as error:
    data.load('folder', folder)
  assert '\n' not in str(error.value)


def test_labels_beyond_the_classifier(folder):
  dataset = data.load('folder', folder)
  assert dataset.numbered_for(2) is dataset
  with pytest.raises(InputError, match='label 1 of example 3 of folder is outside 0…0: check'):
    dataset.numbered_for(1)
  (folder / 'labels.csv').write_text('file,label\nant/0.png,1\nant/1.png,3\n')
  with pytest.raises(InputError, match=r'label 3 .* 0…2: the labels seem to count from 1'):
    data.load('folder', folder).numbered_for(3)


def test_labels_follow_the_names_of_the_classifier(folder):
  dataset = data.load('folder', folder)
  assert dataset.numbered_for(2, ['ant', 'bee']) is dataset
  renumbered = dataset.numbered_for(4, ['cat', 'bee', 'dog', 'ant'])
  np.testing.assert_array_equal(renumbered.labels, [3, 3, 3, 1, 1, 1])
  assert renumbered.class_names[3] == 'ant'
  np.testing.assert_array_equal(renumbered.images([4]), dataset.images([4]))
  with pytest.raises(
    InputError, match=r"class 'bee' of folder is none of the classifier's \(ant, "
  ):
    dataset.numbered_for(3, ['ant', 'wasp', 'cat'])
  with pytest.raises(InputError, match='2 named classes, the classifier 1000 without names'):
    dataset.numbered_for(1000)


# --- the real sets --------------------------------------------------------------------------------


@pytest.mark.real
def test_lesion_masks_fit_their_images():
  dataset = data.load(
    'packed', shared_data('ham10000.npz'), masks=shared_data('ham10000_masks.npz'), image_size=112
  )
  assert dataset.class_names == ('akiec', 'bcc', 'bkl', 'df', 'mel', 'nv', 'vasc')
  darker = [
    dataset.image(i)[dataset.mask(i)].mean() < dataset.image(i)[~dataset.mask(i)].mean()
    for i in range(0, 10000, 250)
  ]
  assert np.mean(darker) > 0.9  # lesions are darker than the skin around them


@pytest.mark.real
def test_imagenet_boxes_fit_their_images():
  dataset = data.load(
    'packed',
    shared_data('imagenet_val_500.npz'),
    masks=shared_data('imagenet_val_500_boxes.json'),
  )
  known = [dataset.mask(i) is not None for i in dataset.ids]
  assert len(dataset) == 500
  assert np.mean(known) > 0.95
  assert dataset.labels[0] == 65
