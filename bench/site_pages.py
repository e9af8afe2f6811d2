"""Hook of MkDocs: the pages of the site that are generated from the code (command line, schema).

mkdocs.yml names it; `make site` builds the site.
"""

import inspect
import re

from mkdocs.structure.files import File
from typer.main import get_command

from posterity.cli.guide import GUIDE
from posterity.cli.main import app
from posterity.results import audit_schema, comparison_schema, eviction_schema, schema

OTHER_KINDS = {"An audit": audit_schema, "Compared trainings": comparison_schema, "Evictions": eviction_schema}


def on_files(files, config):
    """Add the generated pages."""
    for name, text in (("commands.md", commands_page()), ("schema.md", schema_page())):
        files.append(File.generated(config, name, content=text))
    return files


def commands_page() -> str:
    """Return the page of the command line: the question, examples and options of every command."""
    lines = ["# Command line", "", "Every option has a default that fits a first look. Names do the same in Python.", ""]
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
    lines = ["# Schema", "", "Every variable of a result, as files hold it. What they mean: [variables](variables.md).", ""]
    for title, entries in (("Variables", schema.SCHEMA), ("Coordinates", schema.COORDINATES)):
        lines += [f"## {title}", "", "| name | dimensions | units | what |", "|---|---|---|---|"]
        for name, entry in entries.items():
            dims = ", ".join(entry.dims) or "none"
            lines.append(f"| `{name}` | {dims} | {cell(entry.units or '')} | {cell(entry.long_name or '')} |")
        lines.append("")
    for title, module in OTHER_KINDS.items():
        lines += [f"## {title}", "", inspect.getdoc(module) or "", ""]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Return text that fits one cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
