import json

from tools.doctor import as_text, cpu_rate, examine, report

GOOD = {"torch": "2.15.0", "torchvision": "0.29.2", "faiss-cpu": "1.15.1", "faiss-gpu-cuvs": None, "xformers": None}


def test_this_machine_is_ready_and_says_what_it_has(capsys):
    assert report(as_json=False) == 0
    said = capsys.readouterr().out
    for word in ("python", "memory", "disk free", "device", "precision", "attention", "faiss", "packages", "ready"):
        assert word in said


def test_json_says_the_same(capsys):
    assert report(as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["faiss"]["build"] in ("cpu", "gpu")
    assert found["cores"] >= 1
    assert found["memory"] > 1e9


def test_the_cpus_rates_are_measured():
    import torch

    assert cpu_rate(torch.float32, size=128, repeats=2) > 0.1


def test_a_torch_mismatch_is_a_problem_with_its_fix():
    found = examine({**GOOD, "torch": "2.15.0+cpu"})
    assert "devices" not in found  # torch is not touched
    assert "built for CUDA" in found["problems"][0]
    assert "pip install torch torchvision from the same index" in as_text(found)
    assert "cannot run" in as_text(found)


def test_absent_and_old_torch_are_problems():
    assert "not installed" in examine({**GOOD, "torch": None})["problems"][0]
    assert "too old" in examine({**GOOD, "torch": "2.4.1"})["problems"][0]


def test_two_faiss_builds_and_xformers_are_named():
    notes = examine({**GOOD, "faiss-gpu-cuvs": "1.15.1", "xformers": "0.0.35"})["notes"]
    assert any("share one folder" in note for note in notes)
    assert any("xformers" in note for note in notes)
