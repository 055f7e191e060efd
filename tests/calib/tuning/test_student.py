"""A student: it begins as the quantized model is, ends as it has learned, and what does not learn stays."""

import copy

import pytest
import torch
from torch import nn

from dmquant.calib.tuning import loop
from dmquant.calib.tuning.loop import Tuning, rehearse, tune_
from dmquant.calib.tuning.optimizers import Lean
from dmquant.calib.tuning.rounding import Grouped, RoundedWeight
from dmquant.calib.tuning.student import Student, bytes_to_hold
from dmquant.calib.whole.teacher import checkpointing
from dmquant.convert import quantize_
from dmquant.diffusers.families import families
from dmquant.errors import UsageError
from dmquant.kernels import forced
from dmquant.qtensor import WeightSpec
from dmquant.recipe import Recipe
from tests.calib.runs import KEEP, has_same_state
from tests.calib.tuning.cases import runs_of, tiny

ALL = ("weights", "scales", "biases", "norms", "kept")


class Net(nn.Module):
    """A linear layer, a convolution that takes what it gives as an image, and a normalization."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.conv = nn.LayerNorm(40), nn.Linear(40, 72), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.nn.functional.silu(self.linear(self.norm(x))).view(len(x), 8, 3, 3))


def net(**settings):
    torch.manual_seed(0)
    model = Net()
    quantize_(model, Recipe(name="test", keep="none", **{"granularity": "group:16", "activations": "fp6"} | settings))
    return model


def moved(student, x, steps=3, factor=80.0):
    """Let a student take a few large steps towards zero outputs."""
    for _ in range(steps):
        student.set_rates(factor)
        student.backbone(x).square().mean().backward()
        student.step()


RECIPES = {
    "int3": {"weights": "int3"},
    "nvfp4": {"weights": "nvfp4"},
    "negative scales": {"weights": "fp4_e1m2", "store": "fp16", "scale": "mse"},
    "octaves": {"weights": "mxfp4"},
    "table": {"weights": "lut4", "granularity": "channel", "store": "table", "scale": "mse"},
    "branch": {"weights": "int4", "transforms": ["lowrank"]},
    "rotated": {"weights": "fp4", "transforms": ["rotate"]},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_begins_as_the_quantized_model_computes_and_ends_as_it_computed(recipe):
    model, x = net(**RECIPES[recipe]), torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    train = [*ALL[:4], *(["branch"] if recipe == "branch" else [])]
    if recipe in ("octaves", "table"):
        train.remove("scales")
    before = copy.deepcopy(model)
    student = Student(model, train)
    with torch.no_grad(), forced("reference"):
        began = model(x)
        with student.learning():
            assert torch.allclose(model(x), began, atol=1e-5)
    with student.learning():
        moved(student, x)
        with torch.no_grad():
            learned = model(x)
    assert (learned - began).abs().max() > 0.01
    assert 0 < student.commit_() < 1
    with torch.no_grad(), forced("reference"):
        assert torch.allclose(model(x), learned, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == before.state_dict().keys()


def test_scales_move_under_codes_that_stay():
    model, x = net(weights="int3", store="bf16"), torch.randn(4, 40)
    before = copy.deepcopy(model)
    student = Student(model, ["scales"])
    with student.learning():
        moved(student, x)
    assert student.commit_() == 0
    assert torch.equal(model.linear.qweight, before.linear.qweight)
    assert not torch.equal(model.linear.scale, before.linear.scale)
    assert torch.equal(model.linear.bias, before.linear.bias)


def test_a_lora_ends_in_the_codes():
    model, x = net(weights="int4"), torch.randn(4, 40)
    before = copy.deepcopy(model)
    student = Student(model, ["lora"])
    with student.learning():
        moved(student, x, steps=6)
        with torch.no_grad():
            learned = model(x)
    assert student.commit_() > 0
    assert torch.equal(model.linear.scale, before.linear.scale)
    with torch.no_grad(), forced("reference"):
        assert torch.allclose(model(x), learned, atol=1e-5)


def test_gradients_of_rounding():
    spec, shape = WeightSpec.parse("int3", "group:4", store="fp32"), (1, 8)
    latent = torch.tensor([[0.2, -1.4, 3.4, -5.0, 1.0, 1.0, 9.0, 0.0]], requires_grad=True)
    scale, began = torch.tensor([[0.5, 2.0]], requires_grad=True), torch.tensor([[0.5, 2.0]])
    values = RoundedWeight.apply(latent, scale, began, spec, Grouped(spec, shape))
    assert values.tolist() == [[0.0, -0.5, 1.5, -2.0, 2.0, 2.0, 6.0, 0.0]]
    upstream = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0]])
    values.backward(upstream)
    # 3.4 is beyond 3 and led back, -5 is beyond -4 and led further, 9 likewise.
    assert latent.grad.tolist() == [[0.5, 0.5, 0.5, 0.0, 2.0, 2.0, 0.0, 2.0]]
    inside = (0 - 0.2) + (-1 + 1.4)
    assert scale.grad.tolist()[0] == pytest.approx([inside + 3 - 4, 0 + 0 - 3 + 0])


def test_what_a_model_has_not_cannot_be_trained():
    with pytest.raises(UsageError, match="--train branch: this model has nothing of that"):
        Student(net(weights="int4"), ["biases", "branch"])


def test_memory_is_known_before_and_less_with_q_galore():
    model = net(weights="int4")
    student = Student(model, ALL[:3])
    values = sum(tensor.nbytes for of in student.snapshot().values() for tensor in of.values())
    largest = 4 * 40 * 72
    assert bytes_to_hold(model, ALL[:3], None) == values + student.optimizer_bytes + 3 * largest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny pipeline in full precision, and the folder of its runs."""
    return tiny("pixart-sigma"), tmp_path_factory.mktemp("runs")


def started(data, train=ALL, lean=None, **options):
    """A student of a tiny pipeline, its runs to learn from and to judge by, how it is tuned, and its blocks."""
    pipeline, folder = copy.deepcopy(data[0]), data[1]
    learning, held_out = runs_of("pixart-sigma", pipeline, folder, last=2), runs_of("pixart-sigma", pipeline, folder)
    backbone = pipeline.transformer
    quantize_(backbone, Recipe(name="test", keep="none", weights="int3", granularity="group:16", rules=[KEEP]))
    tuning = Tuning(train, lean, **{"steps": 8, "checks": 4} | options)
    return Student(backbone, train, lean), learning, held_out, tuning, families()["pixart"].blocks(backbone)


@pytest.mark.parametrize("lean", [None, Lean(gap=3)])
def test_a_recovery_that_is_stopped_goes_on_to_the_same_bytes_and_is_nearer_to_full_precision(
    data, tmp_path, monkeypatch, lean
):
    straight = started(data, lean=lean)
    ended = tune_(*straight[:4], folder=tmp_path / "straight", key="k")
    assert ended.error < ended.error_before
    assert ended.error == min(ended.errors)

    def stop(done, total, what):
        raise KeyboardInterrupt

    stopped, resumed, told = started(data, lean=lean), started(data, lean=lean), []
    monkeypatch.setattr(loop, "REPORT_EVERY", 5)
    with pytest.raises(KeyboardInterrupt):
        tune_(*stopped[:4], folder=tmp_path / "folder", key="k", bar=stop)
    monkeypatch.undo()
    assert rehearse(*resumed[:2]) > 0  # changes nothing
    again = tune_(*resumed[:4], folder=tmp_path / "folder", key="k", say=told.append)
    assert told == ["tuning: continues after step 4 of 8"]
    assert again == ended
    assert straight[0].commit_() == resumed[0].commit_()
    assert has_same_state(straight[0].backbone, resumed[0].backbone)


def test_another_recovery_does_not_continue_what_is_there(data, tmp_path):
    first, other, told = started(data), started(data), []
    tune_(*first[:4], folder=tmp_path, key="one")
    tune_(*other[:4], folder=tmp_path, key="two", say=told.append)
    assert told == []


def test_a_recovery_that_diverges_ends_with_the_best_and_says_so(data, tmp_path):
    case = started(data, rate=1000.0, checks=8)
    before = case[0].snapshot()
    ended = tune_(*case[:4], folder=tmp_path, key="k")
    assert "above the first" in ended.diverged or "NaN" in ended.diverged
    assert ended.best_step == 0
    after = case[0].snapshot()
    assert all(torch.equal(of[part], after[name][part]) for name, of in before.items() for part in of)


def test_checkpointed_blocks_learn_the_same(data, tmp_path):
    plain, checkpointed = started(data, lean=Lean()), started(data, lean=Lean())
    tune_(*plain[:4], folder=tmp_path / "plain", key="k")
    with checkpointing(checkpointed[0].backbone, checkpointed[4]):
        tune_(*checkpointed[:4], folder=tmp_path / "checkpointed", key="k")
    plain[0].commit_()
    checkpointed[0].commit_()
    assert has_same_state(plain[0].backbone, checkpointed[0].backbone)
