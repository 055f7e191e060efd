"""The teacher's predictions: what an error of them is, and what checkpointing leaves the same."""

import copy

import pytest
import torch

from dmquant.calib.blocks.outputs import Budget
from dmquant.calib.whole.teacher import Teacher, checkpointing
from dmquant.errors import UserError
from tests.calib.runs import captured

OFF = 0.25  # relative error of a student


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return captured("pixart-sigma", tmp_path_factory.mktemp("data"))


def teacher_of(case, tmp_path, samples=None, held=1 << 30, **options):
    """A teacher of a copy of the tiny backbone, which is then free to change."""
    backbone, _, store = case
    samples = range(len(store.samples)) if samples is None else samples
    return Teacher(copy.deepcopy(backbone), store, samples, Budget(held, tmp_path), batch_size=4, **options)


def scaled_(layer, rows, factor):
    """Let the last layer give `factor` times as much in these of its rows."""
    with torch.no_grad():
        layer.weight[rows] *= factor
        layer.bias[rows] *= factor


def test_only_what_the_pipeline_reads_of_a_prediction_is_an_error(case, tmp_path):
    teacher = teacher_of(case, tmp_path)
    last, every = teacher.backbone.proj_out, teacher.samples[:4]  # a batch as it was predicted
    assert teacher.error(every) == 0
    channels = torch.arange(teacher.backbone.config.out_channels)
    of_row = channels.repeat(len(last.bias) // len(channels))  # rows of a patch: places, then channels
    read = of_row < teacher.backbone.config.in_channels
    scaled_(last, ~read, 2.0)
    assert teacher.error(every) == 0
    scaled_(last, read, 1 + OFF)
    expected = OFF**2 * teacher.target(every).square().mean()
    assert teacher.error(every).item() == pytest.approx(expected.item(), rel=1e-4)


def test_predictions_that_do_not_fit_are_the_same_from_a_file(case, tmp_path):
    held, spilled = teacher_of(case, tmp_path), teacher_of(case, tmp_path, held=0)
    batch = held.samples[3:1:-1]
    assert torch.equal(held.target(batch), spilled.target(batch))
    assert torch.equal(held.target(batch), held.predict(batch))
    spilled.close()


def test_a_checkpointed_pass_gives_the_same_bits_and_keeps_less(case, tmp_path):
    teacher = teacher_of(case, tmp_path)
    scaled_(teacher.backbone.proj_out, slice(None), 1 + OFF)

    def passed(blocks):
        kept = {}
        teacher.backbone.zero_grad()

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            checkpointing(teacher.backbone, blocks),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            error = teacher.error(teacher.samples[:4])
        bytes_kept = sum(kept.values())
        error.backward()
        gradients = {name: each.grad for name, each in teacher.backbone.named_parameters() if each.grad is not None}
        return error, gradients, bytes_kept

    error, gradients, kept = passed([])
    again, same, less = passed(case[1])
    assert torch.equal(error, again)
    assert gradients.keys() == same.keys()
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert less < 0.6 * kept


def test_what_cannot_be_taught_is_told(case, tmp_path):
    broken = copy.deepcopy(case[0])
    broken.proj_out.bias.data[0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        teacher_of((broken, *case[1:]), tmp_path)
