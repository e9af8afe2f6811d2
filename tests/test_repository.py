"""The promises that the repository makes about itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "posterity"
TORCH = {"torch", "jaxtyping"}  # jaxtyping: shapes in the signatures, nothing at run time
OUTSIDE = {  # what each module may import beside the standard library and the modules named in INSIDE
    "errors": set(),
    "spans": TORCH,
    "mask": TORCH,
    "horizon": TORCH,
    "fused": TORCH,
    "attention": TORCH,
    "sweep": TORCH,
    "ledger": TORCH,
    "sums": {"torch"},
    "processes": {"torch", "accelerate"},
    "resume": {"torch", "safetensors"},
    "weights": TORCH,
    "readers": TORCH,
    "replay": TORCH,
    "edges": TORCH | {"transformers"},
    "hook": TORCH | {"transformers"},
    "leaks": TORCH | {"transformers"},
    "models": TORCH | {"transformers"},
    "sending": TORCH,
    "losses": TORCH | {"numpy"},
    "inspect": TORCH | {"numpy", "xarray"},
    "loading": TORCH | {"transformers", "huggingface_hub", "rich", "safetensors", "gguf"},
    "folder": set(),
    "corpus": TORCH | {"numpy"},
    "sources": {"datasets"},
    "provenance": TORCH,
    "estimate": TORCH | {"transformers", "psutil"},
    "account": TORCH | {"numpy", "xarray"},
    "measure": TORCH | {"transformers", "rich", "xarray", "numpy"},
    "netcdf": {"numpy", "xarray", "h5py"},
    "result": {"numpy", "xarray"},
    "derived": {"numpy", "xarray"},
    "steps": {"xarray"},
    "summary": {"numpy", "xarray", "rich"},
    "report": {"numpy", "xarray", "jinja2", "plotly", "markupsafe"},
    "train": TORCH | {"transformers"},
    "monitor": TORCH | {"transformers", "numpy", "xarray"},
    "tasks": TORCH | {"transformers"},
    "settings": set(),
    "rows": TORCH | {"transformers", "tokenizers"},
    "runs": TORCH | {"transformers"},
    "quiet": {"transformers", "huggingface_hub"},
    "comparison": TORCH | {"transformers", "numpy", "xarray", "rich"},
    "audit": TORCH | {"transformers", "numpy", "xarray", "rich"},
    "files": {"xarray"},
    "futures": TORCH | {"transformers", "numpy"},
    "myopia": TORCH | {"transformers"},
    "linear": TORCH | {"transformers"},
    "fold": TORCH,
    "folded": TORCH | {"transformers"},
    "cli": {"typer"},
    "cli_training": {"typer"},
    "options": {"typer"},
    "edge": {"typer"},
    "outputs": {"typer"},
    "__main__": set(),
    "__init__": set(),
}
INSIDE = {
    "errors": set(),
    "spans": set(),
    "mask": {"errors", "spans"},
    "horizon": {"errors"},
    "fused": set(),
    "attention": {"errors", "fused", "horizon", "mask"},
    "sweep": {"attention", "mask"},
    "ledger": {"attention", "errors", "mask", "sweep"},
    "readers": {"attention"},
    "sums": set(),
    "weights": {"attention", "ledger", "sums"},
    "replay": {"attention", "errors", "weights"},
    "edges": {"errors", "mask"},
    "hook": {"attention", "edges", "errors", "horizon", "mask", "replay", "weights"},
    "leaks": {"hook", "replay"},
    "models": {"edges", "errors", "hook", "horizon", "leaks", "replay"},
    "sending": {"attention", "models", "replay"},
    "losses": {"attention", "errors", "hook", "horizon", "ledger", "models", "sending", "sums", "weights"},
    "corpus": {"errors"},
    "sources": {"corpus", "errors"},
    "linear": {"attention", "errors"},
    "loading": {"errors", "folded", "folder", "quiet"},
    "quiet": set(),
    "settings": {"errors", "horizon", "tasks"},
    "rows": {"corpus", "settings", "sources"},
    "options": {"errors"},
    "folder": {"errors"},
    "netcdf": {"errors"},
    "result": {"errors", "netcdf"},
    "derived": {"result"},
    "steps": {"errors", "result"},
}


def imports(path):
    """(outside packages, modules of posterity) that a file imports, wherever in the file."""
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"posterity.{alias.name}" for alias in node.names] if node.module == "posterity" else [node.module]
        else:
            continue
        for name in names:
            head, _, tail = name.partition(".")
            if head == "posterity":
                inside.add(tail.split(".")[0])
            elif head not in sys.stdlib_module_names:
                outside.add(head)
    return outside, inside - {"", "__version__"}


MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_it_may(path):
    name = path.parent.name if path.parent != PACKAGE else path.stem
    outside, inside = imports(path)
    assert outside <= OUTSIDE[name]
    if name in INSIDE:
        assert inside - {name} <= INSIDE[name]


def test_the_guard_of_imports_sees_a_forbidden_one(tmp_path):
    bad = tmp_path / "ledger.py"
    bad.write_text(
        "def f():\n    import transformers\n    from posterity import measure\n    from posterity.models import check\n"
    )
    outside, inside = imports(bad)
    assert outside - OUTSIDE["ledger"] == {"transformers"}
    assert inside - INSIDE["ledger"] == {"measure", "models"}


def test_importing_the_operator_loads_torch_and_nothing_heavier():
    code = "import sys, posterity; posterity.attention; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "torch" in loaded
    assert not loaded & {"transformers", "xarray", "plotly", "rich", "typer", "datasets"}


def test_importing_the_package_loads_no_library():
    code = "import sys, posterity; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "numpy", "transformers", "xarray"}


def test_a_public_name_is_the_function_even_where_a_module_has_it_too():
    import posterity
    import posterity.measurement.measure
    import posterity.reporting.report

    for name in posterity.__all__:
        assert callable(getattr(posterity, name)), name
        assert getattr(posterity, name).__doc__


def test_the_readme_maps_every_module():
    readme = (ROOT / "README.md").read_text()
    for path in PACKAGE.iterdir():
        if path.suffix == ".py" and path.stem not in ("__init__", "__main__"):
            assert f"`{path.name}`" in readme, path.name


def test_the_readme_has_no_placeholder():
    assert not re.findall(r"^[A-Z]+$", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_every_link_between_the_documents_leads_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_tests_are_named_where_the_method_cites_them():
    for name in re.findall(r"test_\w+\.py", (ROOT / "docs" / "method.md").read_text()):
        assert (ROOT / "tests" / name).exists(), name


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    import matplotlib
    import torch
    from support.tiny import tiny, tokens
    from transformers import TrainingArguments

    from posterity.training.run import Rows

    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert "context=512" in code
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    known = {"model": tiny("llama"), "tokenizer": None, "documents": tokens(6, 12), "ids": tokens()}
    known |= {"query": query, "key": key, "value": value, "rows": Rows(tokens(8), tokens(8))}
    known["arguments"] = TrainingArguments(str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none")
    small = "context=12, limit=2, contexts=(4, 8), span=12, short=6, budget=12, prefix=6, future=4, prefixes=2, draws=2"
    assert "quick=True" in code
    exec(code.replace("context=512", "context=12").replace("quick=True", small), known)
    assert known["linear"].in_features == 24
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "monitor.html").exists()


def test_every_variable_of_a_result_plots():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from support.sample import sample

    result = sample()
    for name, variable in result.data_vars.items():
        for dims in ([variable.dims[-1]], list(variable.dims[-2:])):
            variable.isel({dim: 0 for dim in variable.dims if dim not in dims}).plot()
            plt.close("all")
            assert variable.attrs["units"], name
            assert variable.attrs["long_name"], name


@pytest.mark.slow
def test_the_wheel_holds_the_pages_template_style_and_script(tmp_path):
    import zipfile

    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for asset in ("template.html.j2", "style.css", "script.js"):
        assert f"posterity/report/{asset}" in names
    assert not [name for name in names if not name.startswith("posterity")]
    metadata = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"posterity = posterity.cli:main" in zipfile.ZipFile(wheel).read(metadata)
