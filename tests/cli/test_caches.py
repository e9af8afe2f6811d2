"""The commands `prices` and `evict` on a tiny model: what they write and print; every mistake in one line."""

import pytest
import torch
from support.model_folders import saved_model  # noqa: F401
from typer.testing import CliRunner

import posterity
from posterity.cli.main import app

TEXT = "the cat sat on the mat and the dog ran to the end of the long road " * 40


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


PRICES = ("--context", 32, "--horizon", 8, "--limit", 8, "--dtype", "float32")
EVICT = ("--prefix", 80, "--continuation", 16, "--limit", 2, "--dtype", "float32")


def test_prices_are_fitted_and_evictions_tried(saved_model, text, tmp_path):  # noqa: F811
    folder = tmp_path / "prices"
    answer = run("prices", saved_model, text, "-o", folder, *PRICES)
    assert answer.exit_code == 0, answer.output
    assert "Prices of 1 key/value heads in 1 layers" in answer.output
    assert f"next: posterity evict {saved_model} OTHER.txt --prices {folder}" in answer.output.replace("\n", "")
    assert not folder.with_name("prices.state").exists()
    fitted = posterity.Prices.load(folder)
    assert fitted.horizon == 8
    assert fitted.attrs["command"].startswith("posterity")
    output, page = tmp_path / "e.nc", tmp_path / "e.html"
    answer = run("evict", saved_model, text, "--prices", folder, "--keep", "1/2,0.25", "--budget", "model", *EVICT,
                 "-o", output, "-r", page)  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert "predicted price" in answer.output
    eviction = posterity.load(output)
    assert eviction.sizes == {"document": 2, "scorer": 12, "budget": 1, "kept": 2}
    assert eviction.kept.values.tolist() == [0.5, 0.25]
    assert eviction.attrs["model"] == str(saved_model)
    assert "What dropped keys and values cost" in page.read_text()
    table = run("table", output, "--kind", "eviction")
    assert table.exit_code == 0, table.output
    answer = run(
        "evict", saved_model, "--task", "copy", "--keep", "1/2", "--save-windows", tmp_path / "w.safetensors", *EVICT
    )
    assert answer.exit_code == 0, answer.output
    assert "task copy" in answer.output
    assert (tmp_path / "w.safetensors").exists()


def test_a_cache_is_compressed_by_the_prices_of_a_folder(saved_model, text, tmp_path):  # noqa: F811
    run("prices", saved_model, text, "-o", tmp_path / "prices", *PRICES)
    loaded = posterity.load_model(saved_model)  # in bfloat16, while prices were fitted in float32
    ids = loaded.tokenizer(TEXT[:200], return_tensors="pt")["input_ids"]
    with posterity.compress(loaded.model, tmp_path / "prices", keep=0.5) as cache, torch.no_grad():
        loaded.model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert cache.pairs_kept[0] < 0.7 * cache.pairs_seen[0]


def test_mistakes_end_in_one_line(saved_model, text, tmp_path):  # noqa: F811
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    wrong = [
        (("prices", saved_model, text, "-o", saved_model, *PRICES), "it is read here"),
        (("prices", saved_model, text, "-o", tmp_path / "mine", *PRICES), "it holds something else"),
        (("prices", saved_model, text, "-o", tmp_path / "p", "--context", 8), "two horizons at least"),
        (("prices", saved_model, text, "-o", tmp_path / "p", *PRICES, "--prices", "loss"), "prices expects"),
        (("evict", saved_model, text, "--keep", "2", *EVICT), "above 0, at most 1; got 2"),
        (("evict", saved_model, text, "--keep", "a", *EVICT), "expected shares of the cache"),
        (("evict", saved_model, text, "--budget", "fair", *EVICT), "--budget expects model, layer, equal; got fair"),
        (("evict", saved_model, text, "--task", "copy", *EVICT), "is written, not read"),
        (("evict", saved_model, "--task", "sort", *EVICT), "expected one of the tasks"),
        (("evict", saved_model, text, "--prices", tmp_path / "mine", *EVICT), "prices.safetensors"),
        (("evict", saved_model, text, "-o", tmp_path / "e.csv", *EVICT), "ends in .nc"),
        (("evict", saved_model, text, "--scores", text, *EVICT), "expected a safetensors file"),
        (
            ("evict", saved_model, text, "--prefix", 60, "--continuation", 16, "--limit", 2),
            "longer than the 64 queries",
        ),
    ]
    for words, message in wrong:
        answer = run(*words)
        assert answer.exit_code == 2, (words, answer.output)
        assert message in answer.output.replace("\n", " "), (words, answer.output)
        lines = [line for line in answer.output.strip().splitlines() if not line.startswith("evicting")]
        assert len(lines) == 1, answer.output
