"""Hook of MkDocs: the pages of the site that are generated from the code (command line, schema, refusals).

mkdocs.yml names it; `make site` builds the site.
"""

import ast
import inspect
import re
from pathlib import Path

from mkdocs.structure.files import File
from typer.main import get_command

from posterity.cli.guide import GUIDE
from posterity.cli.main import app
from posterity.explanations import explanations
from posterity.results import audit_schema, comparison_schema, eviction_schema, feature_schema, schema

PACKAGE = Path(__file__).parent.parent / "src" / "posterity"
REFUSALS = {  # folders of the code, as what a user did there
    "inputs": "Models and texts", "models": "What a model is and does", "ops": "The operator",
    "decomposition": "Gradients",
    "measurement": "Measuring", "clauses": "The audit", "training": "Training", "results": "Results and files",
    "plotting": "Figures", "reporting": "Pages and tables", "cli": "The command line",
}  # fmt: skip
OTHER_KINDS = {
    "An audit": audit_schema, "Compared trainings": comparison_schema, "Evictions": eviction_schema,
    "Features": feature_schema,
}  # fmt: skip


def on_files(files, config):
    """Add the generated pages."""
    pages = {"commands.md": commands_page(), "schema.md": schema_page(), "refusals.md": refusals_page()}
    pages |= {f"refusals/{name}.md": page.text for name, page in explanations().items()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def commands_page() -> str:
    """Return the page of the command line: the question, examples and options of every command."""
    lines = [
        "# Command line",
        "",
        "Every option has a default that fits a first look. Names do the same in Python.",
        "",
    ]
    commands = get_command(app).commands
    for name in GUIDE:
        command, purpose = commands[name], GUIDE[name]
        lines += [f"## posterity {name}", "", purpose.question, "", "```sh", *purpose.examples, "```", ""]
        lines += [inspect.getdoc(command.callback) or "", "", "| argument or option | what |", "|---|---|"]
        lines += [f"| {_option(parameter)} | {cell(parameter.help or '')} |" for parameter in command.params]
        lines.append("")
    return "\n".join(lines)


def _option(parameter) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if names.startswith("`-") else f"`{parameter.name.upper()}`"


def schema_page() -> str:
    """Return the page of all variables: dimensions, units and meaning."""
    lines = [
        "# Schema",
        "",
        "Every variable of a result, as files hold it. What they mean: [variables](variables.md).",
        "",
    ]
    for title, entries in (("Variables", schema.SCHEMA), ("Coordinates", schema.COORDINATES)):
        lines += [f"## {title}", "", "| name | dimensions | units | what |", "|---|---|---|---|"]
        for name, entry in entries.items():
            dims = ", ".join(entry.dims) or "none"
            lines.append(f"| `{name}` | {dims} | {cell(entry.units or '')} | {cell(entry.long_name or '')} |")
        lines.append("")
    for title, module in OTHER_KINDS.items():
        lines += [f"## {title}", "", inspect.getdoc(module) or "", ""]
    return "\n".join(lines)


def refusals_page() -> str:
    """Return the page of every message by which something is refused, with what was expected and what to do."""
    lines = [
        "# Every refusal", "", "All messages of `posterity.InputError`, from the code: what was expected, what came, "
        "what to do. … stands for what the message names. Why some models and inputs are refused: "
        "[limitations](limitations.md).", "", "## Why, and what to do", "", "A message that ends in `posterity explain "
        "PAGE` has a page of its own, in the terminal too:", "",
    ]  # fmt: skip
    lines += [
        f"* [{page.title}](refusals/{name}.md): `posterity explain {name}`" for name, page in explanations().items()
    ]
    lines.append("")
    for folder, title in REFUSALS.items():
        messages = {text for path in sorted((PACKAGE / folder).glob("*.py")) for text in _messages(path)}
        lines += [f"## {title}", "", *(f"* {cell(text)}" for text in sorted(messages)), ""]
    return "\n".join(lines)


def _messages(path: Path) -> list[str]:
    """Return the texts with which a file raises InputError."""
    calls = (x.exc for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Raise))
    errors = (x for x in calls if isinstance(x, ast.Call) and isinstance(x.func, ast.Name) and x.args)
    return [_text(x.args[0]) for x in errors if x.func.id == "InputError" and len(_text(x.args[0])) > 20]


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def cell(text: str) -> str:
    """Return text that fits one cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
