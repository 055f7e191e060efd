"""Recipes: what a name or a file means for each layer, and one clear line where it means nothing."""

import time

import pytest

from dmquant.errors import UsageError, UserError
from dmquant.recipe import Known, Recipe, Rule, bits_names, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load_and_round_trip(name, tmp_path):
    recipe = Recipe.load(name)
    assert recipe.name == name
    recipe.save(tmp_path / "copy.yaml")
    assert Recipe.load(tmp_path / "copy.yaml") == recipe


@pytest.mark.parametrize(
    ("name", "formats"),
    [("w4a6", ("fp4_e2m1", "fp6_e2m3")), ("w8a8", ("fp8_e4m3", "fp8_e4m3")), ("w4a16", ("fp4_e2m1", "none"))],
)
def test_names_by_bits_are_floating_point(name, formats):
    recipe = Recipe.load(name)
    assert (recipe.weights, recipe.activations) == formats
    assert name in bits_names()


def test_formats_of_the_command_line_win():
    recipe = Recipe.load("w4a6", w="int4", a="int8")
    assert (recipe.weights, recipe.activations) == ("int4", "int8")


def test_later_rules_win_and_keep_can_be_taken_back():
    recipe = Recipe(
        name="x",
        rules=[
            Rule(match="*", activations="fp8"),
            Rule(match="blocks.*", weights="fp6", granularity="channel"),
            Rule(match=["blocks.0.*", "head"], keep=True),
            Rule(match="blocks.0.attn", keep=False),
        ],
    )
    assert recipe.settings_by_layer(["blocks.0.ff"])["blocks.0.ff"] is None
    assert recipe.settings_by_layer(["head"])["head"] is None
    attn = recipe.settings_by_layer(["blocks.0.attn"])["blocks.0.attn"]
    assert (attn.weights, attn.activations, attn.granularity) == ("fp6_e2m3", "fp8_e4m3", "channel")
    assert recipe.settings_by_layer(["other"])["other"].weights == "fp4_e2m1"


def test_no_format_for_weights_leaves_a_layer_alone():
    assert Recipe(name="x", rules=[Rule(match="a", weights="bf16")]).settings_by_layer(["a"])["a"] is None


def test_kept_layers_of_a_family_come_before_the_recipes_own_rules():
    recipe = Recipe(name="x", rules=[Rule(match="head", keep=False)]).keeping(["head", "tail"])
    assert recipe.settings_by_layer(["head"])["head"] is not None
    assert recipe.settings_by_layer(["tail"])["tail"] is None


def test_what_a_family_says_is_written_out_before_a_recipes_own_rules():
    own = Rule(match="head", keep=False)
    known = Known({"head": "writes", "tail": "reads"}, {"up.0": 64})
    recipe = Recipe(name="x", rules=[own]).for_model(known)
    assert recipe.keep == "none"
    assert recipe.rules == [Rule(match=["up.0"], split=64), Rule(match=["head", "tail"], keep=True), own]
    assert recipe.for_model(Known({"other": "late"})) is recipe
    assert Recipe.load("rtn").with_settings(keep="none").for_model(known).rules == []


def test_a_format_has_one_name_however_it_is_spelled():
    short, full, upper = (Recipe.load("rtn", w, a) for w, a in (("fp4", "none"), ("fp4_e2m1", "bf16"), ("FP4", "BF16")))
    assert short == full == upper
    assert short.to_dict() == full.to_dict() == upper.to_dict()
    assert Recipe.load("rtn", "NVFP4").weights == "nvfp4"
    assert Recipe(name="x", rules=[Rule(match="a", weights="fp6")]) == Recipe(
        name="x", rules=[Rule(match="a", weights="fp6_e2m3")]
    )


@pytest.mark.parametrize("name", ["adaround", "fpsearch"])
def test_naming_a_recipes_own_format_in_full_keeps_its_candidates(name):
    recipe = Recipe.load(name)
    assert recipe.candidates
    assert Recipe.load(name, "fp4_e2m1", "fp6_e2m3") == Recipe.load(name, "fp4", "fp6") == recipe
    assert Recipe.load(name, "int4").candidates is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: \xff\n", "cannot be read: it is not UTF-8 text"),
        (b"name: x\x00\n", "not valid YAML: special characters are not allowed"),
        (b"name: x\nkeep: all\n", "line 2: keep: Input should be 'family' or 'none'"),
        (b"name: x\nlearning: {itrations: 3}\n", "line 2: learning.itrations: .*did you mean 'iterations'"),
    ],
)
def test_what_is_no_text_and_a_key_of_a_part_are_said_in_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(UsageError, match=rf"^.*mine\.yaml.*{message}.*$"):
        Recipe.load(path)


def test_a_message_quotes_no_more_than_a_line_of_nested_aliases(tmp_path):
    levels = "".join(f"  - &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 3))
    (tmp_path / "bomb.yaml").write_text(f"name:\n  - &a0 [x]\n{levels}weights: fp4\n")
    with pytest.raises(UsageError, match="name: Input should be a valid string") as error:
        Recipe.load(tmp_path / "bomb.yaml")
    assert len(str(error.value)) < 500


NINE = {level: ", ".join([f"*a{level - 1}"] * 9) for level in range(1, 9)}
MERGED = "".join(f"a{level}: &a{level} {{<<: [{below}]}}\n" for level, below in NINE.items())
HARMFUL = {
    "two of a key": ("name: x\nweights: fp4\nweights: int8\n", "line 1: .*the key 'weights' is given twice"),
    "two of a key in a list": ("name: x\nrules:\n- {match: a, keep: true, match: b}\n", "'match' is given twice"),
    "aliases": (f"name: x\ntop: &a0 {{k: 1}}\n{MERGED}", "make too much of it"),
    "an alias of itself": ("name: x\nrules: &a [*a]\n", "line 2: rules"),
    "deep": ("name: " + "[" * 100_000, "recursion"),
    "a million digits": ("name: x\nsplit: " + "9" * 1_000_000, "make too much of it|holds no settings"),
    "thousands of hexadecimal digits": ("name: x\nsplit: 0x" + "f" * 5_000, "make too much of it"),
    "hundreds of digits": ("name: x\nlearning: {iterations: " + "9" * 300 + "}\n", "less than or equal to 10000000"),
    "half a character": ('name: "\\ud800"\n', "surrogates not allowed"),
    "no date": ("name: x\ndescription: 2026-99-99\n", "month must be in 1..12"),
    "no number": ("name: x\nsplit: !!int ''\n", "not valid YAML"),
    "a long key": (f"name: x\n{'k' * 900}: 1\n", "unknown key"),
    "a long name of a format": (f"name: x\nweights: {'f' * 50_000}\n", "unknown format"),
    "a long file": ("name: x\n" + "# more\n" * 200_000, "holds no settings"),
    "a group of a million": ("name: x\ngranularity: group:1000000\n", "unknown granularity"),
    "a group of endless size": (f"name: x\ngranularity: group:{'9' * 23}\n", "unknown granularity"),
    "a name with a line break": ('name: "a\\nb"\n', "a name is one line"),
    "a name that turns the direction": ('name: "a\\u202eb"\n', "a name is one line"),
    "a name with an escape": ('name: "a\\eb"\n', "a name is one line"),
    "no name": ("name: ' '\n", "a name is one line"),
    "a long name": (f"name: {'n' * 101}\n", "a name is one line of up to 100"),
}


@pytest.mark.parametrize(("text", "message"), HARMFUL.values(), ids=HARMFUL)
def test_a_harmful_file_is_refused_in_a_short_line_at_once(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(UsageError, match=message) as error:
        Recipe.load(tmp_path / "mine.yaml")
    assert time.process_time() - began < 5
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_recipe_may_use_anchors(tmp_path):
    rules = "rules:\n- &kept {match: a, keep: true}\n- {<<: *kept, match: b}\n"
    (tmp_path / "mine.yaml").write_text(f"name: x\n{rules}")
    assert [rule.keep for rule in Recipe.load(tmp_path / "mine.yaml").rules] == [True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nweigths: fp4\n", r"line 2: weigths: unknown key 'weigths': did you mean 'weights'"),
        ("name: x\nweights: fp44\n", r"line 2: weights: unknown format 'fp44': did you mean 'fp4'"),
        ("name: x\nweights: fp4_e2m2\n", r"line 2: weights: .*does not add up"),
        ("name: x\nscale: best\n", r"line 2: scale: unknown scale rule 'best'"),
        ("name: x\ngranularity: 64\n", r"line 2: granularity: Input should be a valid string"),
        ("name: x\ngranularity: row\n", r"line 2: granularity: unknown granularity 'row'"),
        (
            "name: x\nrules:\n  - match: a\n    kep: true\n",
            r"line 4: rules.0.kep: unknown key 'kep': did you mean 'keep'",
        ),
        ("name: x\nrules:\n  - keep: true\n", r"line 3: rules.0.match: this key is required"),
        ("name: x\nrules: many\n", r"line 2: rules: Input should be a valid list"),
        (
            "name: x\nrounding: adaruond\n",
            r"line 2: rounding: unknown rounding method 'adaruond': did you mean 'adaround'",
        ),
        (
            "name: x\nrounding:\n  method: adaround\n  regularzer: 1\n",
            r"unknown key 'regularzer': did you mean 'regularizer'",
        ),
        (
            "name: x\nrounding: {method: gptq, damping: 0}\n",
            r"line 2: rounding: damping: Input should be greater than 0",
        ),
        (
            "name: x\ntransforms: [{method: rotate, size: 7}]\n",
            r"line 2: transforms.0: size: a Hadamard block has a power",
        ),
        (
            "name: x\nlearning:\n  unit: tensor\n",
            r"line 3: learning.unit: Input should be 'layer', 'block', 'window' or 'model'",
        ),
        (
            "name: x\nlearning:\n  iterations: -1\n",
            r"line 3: learning.iterations: Input should be greater than or equal",
        ),
        ("name: x\ncalibration:\n  sampler: random\n", r"line 3: calibration.sampler: Input should be 'uniform'"),
        ("name: x\ncandidates: [fp4, fp44]\n", r"line 2: candidates: unknown format 'fp44'"),
        ("weights: fp4\n", r"name: this key is required"),
        ("name: [x\nweights: fp4\n", r"line \d: not valid YAML"),
        ("", r"holds no settings: write each on a line"),
        ("- a\n- b\n", r"holds no settings: write each on a line"),
    ],
)
def test_a_wrong_file_is_one_line_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        Recipe.load(path)
    assert "\n" not in str(error.value)
    assert "mine.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rtnn",), "unknown recipe 'rtnn': did you mean 'rtn'"),
        (("rtn", "fp5"), "unknown format 'fp5'"),
        (("rtn", "fp4", "int9"), "integer formats"),
        (("w5a6",), "unknown recipe 'w5a6': did you mean 'w.a6'.*--w and --a set other formats"),
    ],
)
def test_unknown_names_are_usage_errors(arguments, message):
    with pytest.raises(UsageError, match=message):
        Recipe.load(*arguments)


def test_splits_are_one_rule_for_each_number_and_survive_saving(tmp_path):
    recipe = Recipe(name="x", rules=[Rule(match="a", weights="fp6")])
    assert recipe.splitting({}) == recipe
    split = recipe.splitting({"up.0": 64, "up.1": 32, "up.2": 64})
    assert split.rules[:-1] == [Rule(match=["up.0", "up.2"], split=64), Rule(match=["up.1"], split=32)]
    assert [split.settings_by_layer([name])[name].split for name in ("up.0", "up.1", "up.2", "a")] == [64, 32, 64, None]
    split.save(tmp_path / "x.yaml")
    assert Recipe.load(tmp_path / "x.yaml") == split
    own = Recipe(name="x", rules=[Rule(match="up.*", split=0)]).splitting({"up.0": 64})
    assert own.settings_by_layer(["up.0"])["up.0"].split == 0


@pytest.mark.parametrize(
    ("settings", "calibrated"),
    [
        ({}, False),
        ({"rounding": "adaround"}, True),
        ({"scale": "hessian"}, True),
        ({"candidates": ["fp4_e2m1", "fp4_e1m2"]}, True),
        ({"activation_scale": "static:4"}, True),
        ({"rules": [{"match": "a", "scale": "hessian"}]}, True),
        ({"rules": [{"match": "a", "activation_scale": "online"}]}, False),
    ],
)
def test_a_recipe_takes_data_where_any_part_of_it_does(settings, calibrated):
    recipe = Recipe.model_validate({"name": "x"} | settings)
    assert recipe.calibrated == calibrated
    assert ("learning" in recipe.to_dict()) == calibrated


def test_options_of_the_rounding_method_survive_saving(tmp_path):
    rounding = {"method": "adaround", "scale_aware": True, "beta": [16.0, 2.0]}
    recipe = Recipe.model_validate({"name": "x", "rounding": rounding, "learning": {"unit": "window", "window": 3}})
    recipe.save(tmp_path / "x.yaml")
    loaded = Recipe.load(tmp_path / "x.yaml")
    assert loaded == recipe
    assert loaded.rounding.options == {"scale_aware": True, "beta": [16.0, 2.0]}


def test_naming_another_weight_format_drops_the_candidates_for_it(tmp_path):
    Recipe.model_validate({"name": "x", "candidates": ["fp4_e2m1", "fp4_e1m2"]}).save(tmp_path / "x.yaml")
    assert Recipe.load(tmp_path / "x.yaml").candidates == ["fp4_e2m1", "fp4_e1m2"]
    assert Recipe.load(tmp_path / "x.yaml", w="int4").candidates is None


@pytest.mark.parametrize("source", ["nowhere.yaml", "no/where", "/dev/zero"])
def test_a_file_that_is_not_there_is_no_wrong_use(source):
    with pytest.raises(UserError, match=f"no recipe file {source}") as error:
        Recipe.load(source)
    assert error.value.exit_code == 1


def test_a_recipe_of_its_own_goes_before_one_by_bits():
    recipe = Recipe.load("w4a4")
    assert (recipe.activations, recipe.activation_rule, recipe.calibrated) == ("nvfp4", "mse", True)
    assert "w4a4" not in bits_names()
    assert not Recipe.load("w4a6").calibrated
