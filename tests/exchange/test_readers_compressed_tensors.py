"""compressed-tensors' own decoding of what is written for it; `.ci/run` installs it apart."""

import pytest
import torch

APART = "installed apart from what the other tests need, see .ci/run"
pytest.importorskip("compressed_tensors", reason=APART)

from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from dmquant.exchange.formats import writable
from dmquant.pipelines.models.opening import open_foreign, open_source
from dmquant.recipe import Recipe
from tests.exchange.test_formats import BLOCKS, TAKEN


@pytest.mark.parametrize("name", TAKEN["compressed-tensors"])
def test_its_compressors_decode_to_our_weights(saved, tmp_path, name):
    """In the dtype that each decodes to; NVFP4's scales are divided by a reciprocal, to the last bit of float32."""
    source = open_source(saved(Recipe(name="tried", **BLOCKS[name]), width=64))
    told = writable("compressed-tensors").export(source, tmp_path / "out", lambda done, total: None)
    found = open_foreign(tmp_path / "out").found
    config = QuantizationConfig.model_validate(
        {key: value for key, value in found.config["quantization_config"].items() if key != "version"}
    )
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    for module in source.layers:
        state = {
            one.removeprefix(f"{module}."): found.tensor(one)
            for one in found.tensors
            if one.startswith(f"{module}.") and not one.endswith(".bias")
        }
        assert set(state) <= set(compressor.compression_param_names(scheme))
        theirs = compressor.decompress(state, scheme)["weight"]
        ours = source.layer(module).dequantize(torch.float32)
        if told.exact:
            assert torch.equal(theirs, ours.to(theirs.dtype))
        else:
            assert torch.allclose(theirs.float(), ours, rtol=2.0**-8, atol=0)
            assert (theirs == ours.to(theirs.dtype)).float().mean() > 0.999


def test_the_configuration_is_one_that_it_writes_again(saved, tmp_path):
    source = open_source(saved(Recipe(name="tried", weights="nvfp4"), width=64))
    writable("compressed-tensors").export(source, tmp_path / "out", lambda done, total: None)
    told = dict(open_foreign(tmp_path / "out").found.config["quantization_config"])
    told.pop("version")
    again = QuantizationConfig.model_validate(told).to_dict()
    for name, group in told["config_groups"].items():
        written = {key: value for key, value in again["config_groups"][name].items() if value is not None}
        for key in ("format", "targets"):
            assert written[key] == group[key]
        assert {key: written["weights"].get(key) for key in group["weights"]} == group["weights"]
    assert (again["format"], again["ignore"]) == (told["format"], told["ignore"])
