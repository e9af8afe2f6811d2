"""The command `features` on a tiny model: what it writes and prints; every mistake in one line."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.model_folders import saved_model  # noqa: F401
from typer.testing import CliRunner

import posterity
from posterity.cli.main import app

TEXT = "the cat sat on the mat and the dog ran to the end of the long road " * 40
WORDS = ("--context", 32, "--limit", 3, "--dtype", "float32")


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_file_of_directions_makes_a_result_and_a_page(saved_model, text, tmp_path):  # noqa: F811
    loaded = posterity.load_model(str(saved_model), "float32")
    width = loaded.model.config.hidden_size
    save_file({"layers.0": torch.randn(2, width)}, tmp_path / "d.safetensors")
    output, page = tmp_path / "f.nc", tmp_path / "f.html"
    answer = run("features", saved_model, text, "--directions", tmp_path / "d.safetensors", "--influence",
                 "--positions", "2:9", "-o", output, "-r", page, *WORDS)  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert "positions 2 to 8" in " ".join(answer.output.split())
    assert "step along" in answer.output
    features = posterity.load(output)
    assert features.sizes == {"document": 3, "layer": 1, "pair": 6, "direction": 2, "pull_term": 5, "part": 3}
    assert features.attrs["model"] == str(saved_model)
    assert features.attrs["command"].startswith("posterity")
    assert "What trains the residual stream" in page.read_text()
    assert not output.with_name("f.nc.state").exists()
    table = run("table", output, "--kind", "features")
    assert table.exit_code == 0, table.output
    again = run("features", saved_model, text, "--layers", "0", "--positions", "2:9", *WORDS)
    assert again.exit_code == 0, again.output
    same = posterity.features(loaded, text, layers=[0], positions=(2, 9), context=32, limit=3, progress=False)
    np.testing.assert_array_equal(same.gram, features.gram)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--positions", "a"), "--positions expects a position such as 12, or a range such as 0:64; got a"),
        (("--positions", "1:2:3"), "or a range such as 0:64; got 1:2:3"),
        (("--positions", "40"), "positions expects positions from 0 to 30"),
        (("--layers", "x"), "--layers expects whole numbers with commas"),
        (("--layers", "7"), "this model has no attention layer 7"),
        (("--influence",), "is that on directions; got none"),
        (("--directions", "nowhere.safetensors"), "expected a safetensors file with directions"),
        (("--resume",), "--resume goes on with a run that has an --output"),
        (("-o", "f.txt"), "f.txt"),
    ],
)
def test_mistakes_end_in_one_line(saved_model, text, words, message, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    answer = run("features", saved_model, text, *WORDS, *words)
    assert answer.exit_code == 2
    assert message in " ".join(answer.output.replace("\n", " ").split())
    assert "Traceback" not in answer.output
