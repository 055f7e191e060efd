"""Settings as reports show them: a stranger learns which files, and not where they lie."""

import json

from dmquant.evaluation.result import Metric
from dmquant.pipelines.runs.published import published, published_metric


def settings(source, command):
    return {
        "model": {"name": "m", "source": source},
        "calibration": {"data": "/home/me/data", "prompts": ["a /home/me/cat"]},
        "real": "/home/me/my photos",
        "clip": "ViT-B-32:/home/me/w.pt",
        "command": command,
    }


def test_paths_are_names_of_files_and_ids_of_the_hub_stay(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    local = published(settings("/home/me/pipeline", "dmquant run /home/me/pipeline --real '/home/me/my photos'"))
    assert "/home/me/" not in json.dumps({key: value for key, value in local.items() if key != "calibration"})
    assert local["calibration"]["data"] == "data"
    assert (local["model"]["source"], local["real"], local["clip"]) == ("pipeline", "my photos", "ViT-B-32:w.pt")
    hub = published(settings("org/name", "dmquant run org/name --out some/where"))
    assert hub["model"]["source"] == "org/name"
    assert hub["command"] == "dmquant run org/name --out where"


def test_remarks_on_a_metric_name_files_alone():
    metric = Metric.not_computed("no weights in /home/me/.cache/w.pt: pip install x")
    assert published_metric(metric).reason == "no weights in w.pt: pip install x"
    assert published_metric(Metric(1.0, note=None, images=2)) == Metric(1.0, images=2)
