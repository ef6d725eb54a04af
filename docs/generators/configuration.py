"""docs/reference/configuration.md: every key of every YAML file, from the dataclasses that read it."""

from __future__ import annotations

import ast
import re

import yaml

from generators import HEADER, cell, table
from generators.source import ClassSource, classes, loaded_schemas, subclasses
from ld_common.adapters.registry import ADAPTERS
from ld_common.editing.registry import EDITORS

INTRODUCTION = """\
# Configuration

Every YAML file is read into a dataclass; this page lists their keys, types, defaults and meanings. Each command that
takes `--config FILE` also takes `key=value`, with dots for nested keys (`training.steps=20`). An unknown key is an
error that names the nearest known one; a key that was renamed is an error that names the new one.

"""

SECTIONS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "Study",
        "What the server decides and every site is told. Example: `configs/demo_study.yaml`.",
        [
            ("StudyConfig", ""),
            ("DriftConfig", "drift."),
            ("SearchConfig", "drift.search."),
            ("TrainingConfig", "training."),
            ("DpConfig", "privacy."),
            ("FederationConfig", "federation."),
        ],
    ),
    ("Adapters", "`adapter:` of a study: a `name`, and the options of that adapter.", [("*Adapter", "adapter.")]),
    (
        "Editors",
        "`edit:` of a study, and `key=value` of `ld-generate`: a `name`, the options of every editor, and its own.",
        [("Editor", "edit."), ("*Editor", "edit.")],
    ),
    (
        "Aggregators",
        "`federation.aggregation:` of a study: a `name`, and the options of that aggregator.",
        [("*Aggregator", "federation.aggregation.")],
    ),
    (
        "Modality",
        "What a kind of scan is; the same file on every side. Example: `configs/modalities/brain_mri.yaml`.",
        [
            ("Modality", ""),
            ("AttributeConfig", "attributes.NAME."),
            ("ImageConfig", "image."),
            ("StepConfig", "preprocessing.N."),
        ],
    ),
    (
        "Site",
        "One hospital's own configuration (`site.yaml`). It never leaves the hospital, and it wins over the study.",
        [
            ("SiteConfig", ""),
            ("DataConfig", "data."),
            ("ColumnsConfig", "data.columns."),
            ("JoinedConfig", "data.joined.N."),
            ("RuleConfig", "data.rules.ATTRIBUTE.N."),
            ("SeriesConfig", "data.series."),
            ("PolicyConfig", "policy."),
        ],
    ),
    (
        "Survey",
        "What `ld-server survey new` asks sites before a study is written: rounded counts of their patients.",
        [("SurveyQuestions", ""), ("TableQuestion", "tables.N.")],
    ),
    ("Deployed server", "`server.yaml` in a study's home.", [("ServerConfig", "")]),
    (
        "Simulation",
        "The demo and its simulated hospitals. Examples: `configs/demo.yaml`, `configs/hospitals.yaml`.",
        [
            ("DemoConfig", ""),
            ("HospitalsConfig", ""),
            ("HospitalConfig", "hospitals.N."),
            ("Population", "hospitals.N.population."),
            ("TableConfig", "hospitals.N.table."),
            ("DeviceConfig", "hospitals.N.scanner."),
            ("ScannerConfig", "hospitals.N.scanner."),
            ("DetectorConfig", "hospitals.N.scanner."),
        ],
    ),
]
OTHERS = "Benchmarks and base models"


def page() -> str:
    """The whole page."""
    shown: set[str] = set()
    parts = [HEADER, INTRODUCTION]
    for title, text, members in SECTIONS:
        parts.append(f"## {title}\n\n{text}\n\n")
        for member, prefix in members:
            names = _in_table_order(subclasses(member[1:])) if member.startswith("*") else [member]
            for name in names:
                shown.add(name)
                parts.append(_section(name, prefix))
    rest = [name for name in dict.fromkeys(loaded_schemas()) if name not in shown]
    if rest:
        parts.append(f"## {OTHERS}\n\nConfigs of `ld-benchmark` and of the programs that train the tiny bases.\n\n")
        for name in rest:
            parts += _with_nested(name, shown)
    return "".join(parts).rstrip() + "\n"


def _in_table_order(names: list[str]) -> list[str]:
    """Adapters and editors in the order of their registries; others as they are."""
    order = {name: number for number, name in enumerate([*ADAPTERS, *EDITORS])}
    return sorted(names, key=lambda name: order.get(_registered_name(classes()[name]), len(order)))


def _with_nested(name: str, shown: set[str]) -> list[str]:
    """A class and, after it, those that its fields are made of."""
    shown.add(name)
    parts = [_section(name, "")]
    for field in classes()[name].fields:
        for word in re.findall(r"\w+", field.type):
            if word in classes() and word not in shown and classes()[word].fields:
                parts += _with_nested(word, shown)
    return parts


def _section(name: str, prefix: str) -> str:
    source = classes()[name]
    registered = _registered_name(source)
    title = f"### {f'`{registered}` ({name})' if registered else name}\n\n"
    doc = source.doc.split("\n\n")[0]
    doc = f"{' '.join(doc.split())}\n\n" if doc else ""
    rows = [
        [
            f"`{prefix}{field.name}`",
            _type(field.type),
            _default(field.default),
            cell(field.doc or _first_sentence(field.type)),
        ]
        for field in source.fields
    ]
    parents = [base for base in source.bases if base in classes() and classes()[base].fields]
    inherited = (
        f"It also has the options of {' and '.join(_type(parent) for parent in parents)}.\n\n" if parents else ""
    )
    if not rows:
        return title + doc + (inherited or "It has no options.\n\n")
    return title + doc + inherited + table(["Key", "Type", "Default", "Meaning"], rows) + "\n"


def _registered_name(source: ClassSource) -> str:
    """The `name` under which an adapter, editor or aggregator is registered; empty for other classes."""
    for statement in source.node.body:
        is_name = getattr(getattr(statement, "target", None), "id", "") == "name"
        value = getattr(statement, "value", None)
        if is_name and isinstance(getattr(value, "value", None), str) and "ClassVar" in _annotation(statement):
            return str(value.value)
    return ""


def _type(text: str) -> str:
    """A field's type; a section links to its own table."""
    if text not in classes():
        return f"`{cell(text)}`"
    registered = _registered_name(classes()[text])
    return f"[{text}](#{registered}-{text.lower()})" if registered else f"[{text}](#{text.lower()})"


def _first_sentence(text: str) -> str:
    """What a section's dataclass is, for a field that does not say it."""
    return classes()[text].doc.split("\n\n")[0] if text in classes() else ""


def _default(source: str | None) -> str:
    """A default as YAML writes it; a section has none, its own table does."""
    if source is None:
        return "required"
    try:
        value = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return ""
    text = "empty" if value == "" else yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return f"`{cell(text.removesuffix('...').strip())}`"


def _annotation(statement: object) -> str:
    annotation = getattr(statement, "annotation", None)
    return ast.unparse(annotation) if annotation is not None else ""
