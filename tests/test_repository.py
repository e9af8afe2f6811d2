"""The promises that the repository makes about itself."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "posterity"
# One line; a folder imports only folders to its left. `results` and `ops` do not know each other.
LAYERS = [
    "kernels",
    "ops",
    "decomposition",
    "models",
    "inputs",
    "measurement",
    "clauses",
    "reporting",
    "training",
    "cli",
]
BASE = {"errors", "explanations", "axes", "palette", "progress", "atomic_files", "_version"}
MAY = {name: {*LAYERS[:index], "results", *BASE} for index, name in enumerate(LAYERS)}
MAY |= {
    "kernels": set(),
    "ops": {"kernels", "errors"},
    "decomposition": {"kernels", "ops", "errors", "axes"},
    "results": {"errors", "axes", "atomic_files", "_version"},
    "plotting": {"results", "errors", "axes", "palette"},  # a plot is a function of a Dataset
}
FACE = "posterity"  # the public names: only the command line asks for them by name, for its start-up time
MAY["cli"] |= {FACE}
TORCH = {"torch", "jaxtyping"}  # jaxtyping: shapes in the signatures, nothing at run time
HUGGING_FACE = {"transformers", "huggingface_hub"}
OUTSIDE = {
    "kernels": {"triton"},
    "ops": TORCH,
    "decomposition": TORCH,
    "models": TORCH | HUGGING_FACE,
    "inputs": TORCH | HUGGING_FACE | {"numpy", "datasets", "safetensors", "gguf", "rich", "peft"},
    "results": {"numpy", "xarray", "h5py", "pandas"},
    "plotting": {"numpy", "xarray", "matplotlib"},
    "measurement": TORCH
    | HUGGING_FACE
    | {"numpy", "pandas", "xarray", "rich", "accelerate", "safetensors", "filelock", "psutil"},
    "clauses": TORCH | HUGGING_FACE | {"numpy", "xarray", "rich", "plotly"},
    "reporting": {"numpy", "xarray", "rich", "jinja2", "markupsafe", "plotly"},
    "training": TORCH | HUGGING_FACE | {"numpy", "xarray", "tokenizers"},
    "cli": {"typer"},
}
ROOT_OUTSIDE = {"progress": {"rich"}, "palette": {"numpy"}}


def imports(path):
    """(outside packages, modules of posterity) that a file imports, wherever in the file."""
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        for name in names:
            head, _, tail = name.partition(".")
            if head == "posterity":
                inside.add(tail.split(".")[0] or FACE)
            elif head not in sys.stdlib_module_names:
                outside.add(head)
    return outside, inside


MODULES = sorted(PACKAGE.rglob("*.py"))


def breaches(path, folder):
    """What a file of a folder imports against the law, function-level imports included."""
    outside, inside = imports(path)
    return (outside - OUTSIDE[folder]) | (inside - {folder} - MAY[folder])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_to_its_left(path):
    folder = path.parent.name
    if path.parent != PACKAGE:
        assert not breaches(path, folder)
        return
    outside, inside = imports(path)
    assert outside <= ROOT_OUTSIDE.get(path.stem, set())
    if path.stem not in ("__init__", "__main__"):
        assert inside <= ({"explanations"} if path.stem == "errors" else {"errors"})


def test_the_guard_of_imports_sees_a_forbidden_one_and_a_late_one(tmp_path):
    bad = tmp_path / "credit.py"
    bad.write_text(
        "from posterity.ops import attention\nfrom posterity import measure\n"
        "def f():\n    import transformers\n    from posterity.models.probe import check\n"
    )
    assert breaches(bad, "decomposition") == {"transformers", "models", FACE}


LATE = {"cli": "start-up time", "__init__": "start-up time"}  # where an import may stand inside a function, and why


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_late_imports_of_the_package_are_those_of_the_command_line_and_the_face(path):
    name = path.parent.name if path.parent != PACKAGE else path.stem
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    late = {
        node.module
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posterity")
    }
    assert not late or name in LATE


def test_no_two_modules_make_a_circle():
    graph = {}
    for path in MODULES:
        name = ".".join(("posterity", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posterity."):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = names
    order = TopologicalSorter({name: names & set(graph) for name, names in graph.items() if name != "posterity"})
    order.prepare()  # CycleError names the modules of a circle


def test_every_folder_says_what_lives_there_and_the_map_of_contributors_has_it():
    overview = (ROOT / "CONTRIBUTING.md").read_text()
    for folder in (path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert f"`{folder.name}/`" in overview, folder.name
        for path in folder.glob("*.py"):
            assert path.stem == "__init__" or f"`{path.stem}`" in text, path


def test_no_two_public_functions_or_classes_share_a_name():
    places = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    doubled = {name: where for name, where in places.items() if len(where) > 1}
    assert not doubled


@pytest.mark.parametrize("name", ["load", "save", "stats", "table", "plot", "InputError"])
def test_reading_a_result_imports_neither_torch_nor_transformers(name):
    code = f"import sys, posterity; posterity.{name}; import posterity.results.schema; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(run.stdout.split())


@pytest.mark.parametrize("name", ["table", "summary"])
def test_only_plots_import_matplotlib(name):
    code = f"import sys, posterity; posterity.{name}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib" not in run.stdout.split()


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


def test_every_public_name_is_listed_and_documented():
    import posterity

    assert set(dir(posterity)) == set(posterity.__all__)
    for name in posterity.__all__:
        assert getattr(posterity, name).__doc__, name


def test_the_readme_is_short_and_has_no_placeholder():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    assert not re.findall(r"^[A-Z]+$", readme, re.MULTILINE)


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## {version}, " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()
    assert f"\n  version: {version}\n" in (ROOT / "recipe" / "recipe.yaml").read_text()


def test_every_link_between_the_documents_leads_somewhere():
    generated = {"commands.md", "schema.md", "refusals.md"}  # by bench/site_pages.py
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert target in generated or (document.parent / target).exists(), f"{document.name}: {target}"


def test_tests_are_named_where_the_method_cites_them():
    for name in re.findall(r"test_\w+\.py", (ROOT / "docs" / "method.md").read_text()):
        assert any((ROOT / "tests").rglob(name)), name


@pytest.mark.slow
def test_the_lines_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    exec(code, {})
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "lags.pdf").exists()


def test_the_example_of_every_function_runs(tmp_path, monkeypatch):
    import matplotlib
    import torch
    from support.tiny import tiny, tokens
    from transformers import TrainingArguments

    from posterity.training.data import Rows

    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL).group(1)
    assert "context=512" in code
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    known = {"model": tiny("llama"), "tokenizer": None, "documents": tokens(6, 12), "ids": tokens()}
    known |= {"query": query, "key": key, "value": value, "rows": Rows(tokens(8), tokens(8))}
    known["arguments"] = TrainingArguments(str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none")
    small = "context=12, limit=2, contexts=(4, 8), span=12, short=6, pass_tokens=12, prefix=6, future=4, prefixes=2, "
    small += "draws=2"
    assert "quick=True" in code
    code = code.replace("horizon=256", "horizon=6, limit=2").replace("max_new_tokens=32", "max_new_tokens=2")
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
    assert "posterity/py.typed" in names
    for asset in ("result.html.j2", "style.css", "theme.js"):
        assert f"posterity/reporting/assets/{asset}" in names
    assert not [name for name in names if not name.startswith("posterity")]
    metadata = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"posterity = posterity.cli.main:main" in zipfile.ZipFile(wheel).read(metadata)
