import socket
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dmquant.errors import UserError
from dmquant.evaluation.networks import features
from dmquant.evaluation.networks.features import FeatureStore
from tests.evaluation.conftest import RandomNetwork, smooth_images, write_images
from tests.forked import Forked


class BatchNetwork(RandomNetwork):
    """Features that tell which images shared the batch, as those of real networks do in their last bits."""

    def __call__(self, batch):
        rows = super().__call__(batch)
        return rows + rows.mean(dim=0)


@pytest.fixture
def images(tmp_path):
    """Nineteen images of three sizes: four batches of five, the last one short."""
    for index in range(19):
        write_images(tmp_path / "images" / f"{index:02d}", smooth_images(1, size=16 * (1 + index % 3), seed=index))
    return sorted((tmp_path / "images").glob("*/*.png"))


def test_features_are_those_of_each_image_in_the_order_given(images):
    network = RandomNetwork()
    rows = FeatureStore().images(network, images[::-1])
    alone = torch.cat([network(network.prepare(path)[None]) for path in images[::-1]])
    torch.testing.assert_close(rows, alone)


def test_each_image_is_looked_at_once_also_under_another_name(images, tmp_path):
    store, network = FeatureStore(), RandomNetwork()
    rows = store.images(network, images)
    copies = [tmp_path / f"copy{index}.png" for index in range(19)]
    for path, copy in zip(images, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    assert torch.equal(store.images(network, copies + images[:3]), torch.cat([rows, rows[:3]]))
    assert network.calls == 19


def test_a_rewritten_image_is_looked_at_again(tmp_path):
    store, network = FeatureStore(), RandomNetwork()
    path = write_images(tmp_path, smooth_images(1)) / "00000.png"
    first = store.images(network, [path])
    write_images(tmp_path, smooth_images(1, seed=9))
    assert not torch.equal(store.images(network, [path]), first)


def test_the_order_of_the_images_does_not_change_a_bit(images):
    rows = FeatureStore().images(BatchNetwork(), images)
    order = np.random.default_rng(0).permutation(19)
    assert torch.equal(FeatureStore().images(BatchNetwork(), [images[i] for i in order]), rows[order])


def test_another_command_reads_the_features_from_the_folder(images, tmp_path):
    rows = FeatureStore(tmp_path / "features").images(BatchNetwork(), images)
    again = BatchNetwork()
    assert torch.equal(FeatureStore(tmp_path / "features").images(again, images), rows)
    assert again.calls == 0


def test_networks_and_preparations_do_not_share_rows(images, tmp_path):
    store = FeatureStore(tmp_path / "features")
    one, other, third = RandomNetwork("one"), RandomNetwork("other"), RandomNetwork("one")
    other.projection = -one.projection
    third.preparation = "cropped"
    rows = store.images(one, images)
    assert not torch.equal(store.images(other, images), rows)
    store.images(third, images)
    assert (one.calls, other.calls, third.calls) == (19, 19, 19)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_killed_command_resumes_after_its_last_saved_batch_with_the_same_bits(images, tmp_path, monkeypatch, batches):
    monkeypatch.setattr(features, "SAVE_EVERY", 0.0)
    uninterrupted = FeatureStore().images(BatchNetwork(), images)

    class Killed(BatchNetwork):
        def __call__(self, batch):
            if self.calls == 5 * batches:
                raise KeyboardInterrupt
            return super().__call__(batch)

    with pytest.raises(KeyboardInterrupt):
        FeatureStore(tmp_path / "features").images(Killed(), images)
    resumed = BatchNetwork()
    assert torch.equal(FeatureStore(tmp_path / "features").images(resumed, images), uninterrupted)
    assert resumed.calls == 19 - 5 * batches


def test_nothing_is_written_within_the_interval_until_the_end(images, tmp_path):
    written = []
    seen = lambda *_: written.append(len(list((tmp_path / "features").glob("*/*"))))  # noqa: E731
    FeatureStore(tmp_path / "features").images(RandomNetwork(), images, progress=seen)
    assert written == [0, 0, 0, 0]
    assert len(list((tmp_path / "features").glob("*/*"))) == 1


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * 99])
def test_a_damaged_file_is_computed_again(images, tmp_path, damage):
    rows = FeatureStore(tmp_path / "features").images(BatchNetwork(), images)
    (path,) = (tmp_path / "features").glob("*/*")
    path.write_bytes(damage(path.read_bytes()))
    again = BatchNetwork()
    assert torch.equal(FeatureStore(tmp_path / "features").images(again, images), rows)
    assert again.calls == 19
    assert FeatureStore(tmp_path / "features").images(BatchNetwork(), images).equal(rows)


def test_prompts_are_encoded_once_and_kept(tmp_path):
    encoded = []

    def encode(texts):
        encoded.extend(texts)
        return torch.tensor([[float(len(text)), float(text.count("a"))] for text in texts])

    prompts = ["a cat", "banana", "", "a cat", "größer", *(f"prompt {index}" for index in range(9))]
    rows = FeatureStore(tmp_path).texts(RandomNetwork(), prompts, encode)
    assert rows.tolist() == [[len(text), text.count("a")] for text in prompts]
    assert sorted(encoded) == sorted(set(prompts))
    assert torch.equal(FeatureStore(tmp_path).texts(RandomNetwork(), prompts[::-1], encode), rows.flip(0))
    assert len(encoded) == 13


def test_the_next_batch_is_read_while_the_network_works(images):
    second = threading.Event()

    class Watching(RandomNetwork):
        prepared = 0

        def prepare(self, path):
            self.prepared += 1
            if self.prepared > self.batch_size:
                second.set()
            return super().prepare(path)

        def __call__(self, batch):
            assert second.wait(timeout=30), "nothing of the second batch was read during the first"
            return super().__call__(batch)

    assert len(FeatureStore().images(Watching(), images)) == 19


def test_progress_counts_images_and_says_nothing_where_all_are_known(images):
    store, steps = FeatureStore(), []
    tell = lambda *step: steps.append(step)  # noqa: E731
    store.images(RandomNetwork(), images[:7], tell, "features")
    assert steps == [("features", 5, 7), ("features", 7, 7)]
    store.images(RandomNetwork(), images[:9], tell, "features")
    assert steps[2:] == [("features", 9, 9)]
    store.images(RandomNetwork(), images[:9], tell, "features")
    assert len(steps) == 3


def test_images_that_cannot_be_read_are_named(tmp_path):
    store, network = FeatureStore(), RandomNetwork()
    with pytest.raises(UserError, match=r"absent\.png does not exist"):
        store.images(network, [tmp_path / "absent.png"])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"broken\.png is not a readable image"):
        store.images(network, [tmp_path / "broken.png"])
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png has more than 8 bits"):
        store.images(network, [tmp_path / "deep.png"])


def test_greyscale_and_transparent_images_have_features(tmp_path):
    Image.new("L", (20, 20), 128).save(tmp_path / "grey.png")
    Image.new("RGB", (20, 20), (128, 128, 128)).save(tmp_path / "rgb.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (20, 20), "white").save(tmp_path / "white.png")
    names = ("grey", "rgb", "clear", "white")
    grey, rgb, clear, white = FeatureStore().images(RandomNetwork(), [tmp_path / f"{name}.png" for name in names])
    torch.testing.assert_close(grey, rgb)
    torch.testing.assert_close(clear, white)


WORKER = """
import sys
from pathlib import Path
import torch
from dmquant.host import processes
from dmquant.errors import UserError
from dmquant.evaluation.networks.features import FeatureStore
from tests.evaluation.networks.test_features import BatchNetwork

torch.set_num_threads(1)
folder, images = Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]]
with processes.joined() as ours:
    network = BatchNetwork()
    rows = FeatureStore(folder / "features").images(network, images)
    again = BatchNetwork()
    assert FeatureStore(folder / "features").images(again, images).equal(rows) and again.calls == 0
    torch.save((rows, network.calls), folder / f"{ours.rank}.pt")
    broken = folder / "broken.png"
    broken.write_bytes(b"no image")
    try:
        FeatureStore().images(network, [*images, broken])
    except UserError as error:
        (folder / f"{ours.rank}.txt").write_text(str(error))
"""


def test_two_processes_share_the_work_and_agree_with_one_bit_for_bit(images, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    workers = [Forked(["-c", WORKER, tmp_path, *images], shared | {"RANK": rank}) for rank in ("0", "1")]
    assert [worker.wait(300) for worker in workers] == [0, 0]
    expected = FeatureStore().images(BatchNetwork(), images)
    (rows, calls), (others, other_calls) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(rows, expected)
    assert torch.equal(others, expected)
    assert sorted((calls, other_calls)) == [9, 10], "each looked at half of the images"
    assert all("is not a readable image" in (tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
